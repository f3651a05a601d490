"""What an objective is: a small module that turns the forward pass of a batch into a sum for each task."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from siglip_train.batch import Batch
from siglip_train.data.config import ViewsConfig
from siglip_train.data.inputs.base import Input
from siglip_train.data.inputs.captions import CaptionInput
from siglip_train.data.inputs.images import ImageInput
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.objectives.forward_pass import ForwardPass


class Losses(NamedTuple):
    """What a training step gives back. A NamedTuple, as ZeRO-3 does not see into a dataclass.

    total: what this rank differentiates; its mean over ranks is the weighted sum of the objectives. terms: each
    objective's own value, unweighted and detached, by name, and beside it each task of those that have several, as
    `objective/task`; they too become global values as means over ranks.
    """

    total: Tensor
    terms: dict[str, Tensor]


class StepSizes(NamedTuple):
    """What the work of a step depends on beside the objectives."""

    model: SiglipConfig
    views: ViewsConfig


class Objective(nn.Module):
    """A term of the loss: of each of its tasks, the mean over the samples of the global batch that take part in it.

    Heads and running averages of its own are submodules and buffers: they are trained, saved and resumed with the
    model. Evaluations call it too, so what it remembers of a forward, it remembers while `self.training` alone. Every
    rank runs every pass in every micro-batch, with samples of weight zero if need be: under ZeRO-3 the others would
    wait for a rank that leaves one out.

    weight: factor of this term in the total. Raises ValueError unless it is finite and above 0.
    inputs: the classes of what it needs of a sample.
    pairs_samples: whether samples are compared with one another, so that the sums of a batch are not those of its
        parts. Such an objective asks the forward pass for embeddings alone.
    averaged: names of its modules that the teacher has a moving average of; there is a teacher where there are any.
    task_weights: factors of its tasks within the term, 1 where none is given.
    """

    inputs: tuple[type[Input], ...] = (CaptionInput, ImageInput)
    pairs_samples = False
    averaged: tuple[str, ...] = ()

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"weight is {weight}: give a finite number above 0, or leave the objective out of the config"
            )
        self.weight = weight
        self.task_weights: dict[str, float] = {}

    def share_with(self, model: Siglip) -> None:
        """Take what the objective shares with the model, once, when both are put together. Raises `UserError`."""

    def share_among(self, objectives: Mapping[str, nn.Module]) -> None:
        """Take what the objective shares with others of the run, after `share_with`. Raises `UserError`."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many of this rank's samples take part in each task, from the batch alone: all of them in one task."""
        return {"samples": batch.size}

    def forward(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        """Return the sum over this rank's samples for each task of `counts`: scalars, 0 where none takes part."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Do what follows an optimizer step that has changed the weights.  # all ranks"""

    def metrics(self) -> dict[str, float]:
        """More numbers for the log, `train/<objective>/<name>`, read after a step that is logged.  # all ranks"""
        return {}

    def flops_per_sample(self, sizes: StepSizes) -> float:  # noqa: ARG002  # for those that need it
        """Operations of a step, forward and backward, for each sample, beside the towers' on image and text."""
        return 0.0
