"""How hard each objective pulls at the weights that they share: the norm of its gradient, in the log on request."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siglip_train.batch import Batch
from siglip_train.loop import (
    Flags,
    StepReport,
    Trainer,
    divisors,
    plain_step,
    spoilt_unless_finite,
    update_weights,
)
from siglip_train.objectives.base import Losses
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.training_model import Divisors, TrainingModel


class _Apart:
    """The losses of each objective with their graphs.

    NOTE: an object and no dict: DeepSpeed (0.19.8) puts hooks on the tensors that a forward returns in containers, and
    a gradient through them would count as a backward pass of the engine.
    """

    def __init__(self, losses: dict[str, Losses]) -> None:
        self.losses = losses


def measured_step(run: Trainer, batch: Batch, step: int, *, every: int) -> tuple[StepReport, bool]:
    """`plain_step`, which every so many steps also takes the gradient of each objective. All ranks.

    Such a step costs, for each objective, one more backward pass and an all-reduce of all gradients of the model, which
    it holds besides. Losses and update are the same. At ZeRO 0 to 2: stage 3 has let go of the weights after one pass.
    """
    if step % every:
        return plain_step(run, batch, step)
    shared = divisors(run, batch)
    losses, apart = run.engine(batch.to(run.world.device), shared, partial(_keep_apart, divisors=shared))
    flags = Flags(run, losses)
    model = run.engine.module
    weights = [weight for weight in model.model.parameters() if weight.requires_grad]
    norms = {f"{name}_grad_norm": _norm(each.total, weights) for name, each in apart.losses.items()}
    run.engine.backward(spoilt_unless_finite(losses.total))
    return update_weights(run, losses, flags, step, norms)


def _keep_apart(
    model: TrainingModel, forward_pass: ForwardPass, *, divisors: Divisors
) -> tuple[Losses, _Apart]:
    found = {name: model.losses(forward_pass, divisors, [name]) for name in model.objectives}
    terms = {name: term for losses in found.values() for name, term in losses.terms.items()}
    return Losses(torch.stack([losses.total for losses in found.values()]).sum(), terms), _Apart(found)


def _norm(loss: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
    """The norm, over all `weights`, of the mean of the ranks' gradients of `loss`. All ranks."""
    if not (weights and loss.requires_grad):
        return loss.new_zeros(())
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    total = torch.zeros((), dtype=torch.float64, device=loss.device)
    for weight, gradient in zip(weights, gradients, strict=True):
        # on all ranks alike, even should one have none
        mean = torch.zeros_like(weight) if gradient is None else gradient.contiguous()
        dist.all_reduce(mean)
        total += (mean / dist.get_world_size()).square().sum()
    return total.sqrt()
