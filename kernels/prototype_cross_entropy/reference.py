"""The definition. Holds all logits, differentiable by autograd, any dtype: the op must agree with it."""

import torch
from torch import Tensor

from kernels.prototype_cross_entropy.op import PrototypeSums, Temperatures


def prototype_cross_entropy_reference(
    student: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    centre: Tensor,
    *,
    temperatures: Temperatures,
    weights: Tensor | None = None,
) -> PrototypeSums:
    """Shapes as in `prototype_cross_entropy`."""
    logits = teacher @ teacher_prototypes.T  # [R, K]
    targets = ((logits - centre) / temperatures.teacher).softmax(-1).detach()
    log_shares = (student @ prototypes.T / temperatures.student).log_softmax(-1)  # [R, V, K]
    losses = -(targets[:, None] * log_shares).sum(-1)  # [R, V]
    if weights is None:
        weights = torch.ones_like(losses)
    return PrototypeSums((losses * weights).sum(), logits.sum(0).detach(), targets.sum(0))
