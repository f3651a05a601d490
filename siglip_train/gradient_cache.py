"""Global batches larger than memory, exactly: embed in micro-batches, take the loss of all pairs once, then go again.

The second time through the towers keeps the graph, and ends in the gradient of the embeddings (GradCache, Gao et al.
2021, arXiv 2101.06983). It costs one more forward, and takes the memory of one micro-batch and of all embeddings.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from siglip_train import engine as engines
from siglip_train.batch import Batch
from siglip_train.data.inputs.images import ImageInput
from siglip_train.errors import UserError
from siglip_train.loop import Flags, StepReport, Trainer, divisors, spoilt_unless_finite, update_weights
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.base import Losses
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.training_model import Divisors, TrainingModel


class _RandomState(NamedTuple):
    cpu: Tensor
    gpu: Tensor | None


class _First(NamedTuple):
    """The first pass of a micro-batch: where it began to draw random numbers, and its embeddings without graph."""

    random_state: _RandomState
    image_embedding: Tensor  # [b, E]
    text_embedding: Tensor  # [b, E]


class _Replay(NamedTuple):
    """What the second pass needs of the first: its random state and the gradients, None where nothing uses them."""

    random_state: _RandomState
    gradients: tuple[Tensor | None, Tensor | None]  # [b, E] each


class StoredPass(ForwardPass):
    """A pass of which only the embeddings were kept, for objectives that pair samples. Its images are elsewhere."""

    def __init__(self, model: Siglip, batch: Batch, images: Tensor, texts: Tensor) -> None:
        super().__init__(model, batch)
        self.image_embedding, self.text_embedding = images, texts

    def _not_kept(self) -> NoReturn:
        raise UserError(
            "an objective that pairs samples asks for more than their embeddings, which is all that the gradient "
            "cache keeps: leave the objective out or set micro_batch_size=null"
        )

    image = text = property(_not_kept)  # type: ignore[assignment]


def cached_step(run: Trainer, batch: Batch, step: int) -> tuple[StepReport, bool]:
    """`plain_step` in micro-batches of `run.schedule.micro_batch_size` pairs: same losses, same update. All ranks.

    Objectives that pair samples see the whole batch at once; the others are sums, which need one pass only. Dropout in
    a tower meets the same masks in both passes; those of one large batch would be others.
    """
    objectives = run.engine.module.objectives
    pairing = [name for name in objectives if objectives[name].pairs_samples]
    others = [name for name in objectives if name not in pairing]
    micro_batches = batch.split(run.schedule.micro_batch_size)
    shared = divisors(run, batch)
    with engines.one_reduction(run.engine):
        parts, replays = _pair(run, batch, micro_batches, shared, pairing) if pairing else ([], None)
        for index, micro_batch in enumerate(micro_batches):
            replay = None if replays is None else replays[index]
            part = partial(_differentiated, replay=replay, divisors=shared, names=others)
            total, losses = run.engine(micro_batch.to(run.world.device), shared, part)
            # it does not where every tower is frozen
            if total.requires_grad:
                run.engine.backward(spoilt_unless_finite(total))
            parts.append(losses)
    losses = _sum(parts, order=objectives)
    return update_weights(run, losses, Flags(run, losses), step)


def _pair(
    run: Trainer, batch: Batch, micro_batches: Sequence[Batch], divisors: Divisors, names: Sequence[str]
) -> tuple[list[Losses], list[_Replay]]:
    """The losses between all samples, and what gives the towers their gradient.

    The logit scale, the bias and what such objectives own have got theirs on return, once and for all pairs.
    """
    firsts = [_embed(run, micro_batch, divisors) for micro_batch in micro_batches]
    images = torch.cat([first.image_embedding for first in firsts]).requires_grad_()
    texts = torch.cat([first.text_embedding for first in firsts]).requires_grad_()
    # pairs may be told by their captions, but hardly by pixels, which would not all fit
    parts = {name: part for name, part in batch.parts.items() if name != ImageInput.part}
    light = batch._replace(parts=parts).to(run.world.device)

    def part(model: TrainingModel, _: ForwardPass) -> Losses:
        return model.losses(StoredPass(model.model, light, images, texts), divisors, names)

    losses = run.engine(light, divisors, part)
    run.engine.backward(spoilt_unless_finite(losses.total))
    gradients = zip(*(_split(leaf.grad, micro_batches) for leaf in (images, texts)), strict=True)
    replays = [_Replay(first.random_state, pair) for first, pair in zip(firsts, gradients, strict=True)]
    return [losses._replace(total=losses.total.detach())], replays


def _embed(run: Trainer, micro_batch: Batch, divisors: Divisors) -> _First:
    state = _random_state(run.world.device)
    with torch.no_grad():
        images, texts = run.engine(micro_batch.to(run.world.device), divisors, _embeddings)
    return _First(state, images, texts)


def _embeddings(_: TrainingModel, forward_pass: ForwardPass) -> tuple[Tensor, Tensor]:
    # always in this order, as both passes must draw the same random numbers
    return forward_pass.image_embedding, forward_pass.text_embedding


def _split(gradient: Tensor | None, micro_batches: Sequence[Batch]) -> Sequence[Tensor | None]:
    if gradient is None:
        return [None] * len(micro_batches)
    return gradient.split([micro_batch.size for micro_batch in micro_batches])


def _differentiated(
    model: TrainingModel,
    forward_pass: ForwardPass,
    *,
    replay: _Replay | None,
    divisors: Divisors,
    names: Sequence[str],
) -> tuple[Tensor, Losses]:
    """The second pass: a scalar whose gradient is this micro-batch's part of the whole, and its part of the losses."""
    products = []
    if replay is not None:
        with _replaying(replay.random_state):
            embeddings = _embeddings(model, forward_pass)
        products = [
            (embedding * gradient).sum()
            for embedding, gradient in zip(embeddings, replay.gradients, strict=True)
            if gradient is not None
        ]
    losses = model.losses(forward_pass, divisors, names)
    total = torch.stack([losses.total, *products]).sum()
    return total, losses._replace(total=losses.total.detach())


def _sum(parts: Sequence[Losses], order: Iterable[str]) -> Losses:
    """Add up parts; terms in the order of the objectives, each before its tasks."""
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, term in part.terms.items():
            found.setdefault(name, []).append(term)
    names = [name for objective in order for name in found if name.partition("/")[0] == objective]
    total = torch.stack([part.total for part in parts]).sum()
    return Losses(total, {name: torch.stack(found[name]).sum() for name in names})


def _random_state(device: torch.device) -> _RandomState:
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return _RandomState(torch.get_rng_state(), gpu)


@contextmanager
def _replaying(state: _RandomState) -> Iterator[None]:
    """Draw again what was drawn from `state` on; afterwards random numbers go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[] if state.gpu is None else [torch.cuda.current_device()]):
        torch.set_rng_state(state.cpu)
        if state.gpu is not None:
            torch.cuda.set_rng_state(state.gpu)
        yield
