"""The teacher: copies of trained modules whose weights are moving averages of theirs, in fp32, without gradients."""

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Momentum by global batch: COSMOS (arXiv 2412.01814) for 1k and 4k, and what SILC is remembered to take at 16k. An
# assumption: SigLIP 2 gives none.
_MOMENTUM = ((1024, 0.999), (4096, 0.99), (16384, 0.966))


@dataclass
class EmaConfig:
    """The teacher of self-distillation and masked prediction.

    momentum: share of its weights that it keeps in a step, fixed; null = by the global batch, 0.999 to 1,024 pairs,
    0.99 at 4,096, 0.966 from 16,384, log-linear between them.
    scope: tower_and_head = the teacher has a vision tower of its own (SILC, TIPS); head = its tower is the student's,
    and only heads are averaged (TIPSv2), which takes less memory.
    """

    momentum: float | None = None
    scope: Literal["tower_and_head", "head"] = "tower_and_head"

    def __post_init__(self) -> None:
        """Check the range."""
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}: give a share of at least 0 and below 1, or null")

    def momentum_at(self, global_batch_size: int) -> float:
        """The momentum of a run with this batch."""
        return usual_momentum(global_batch_size) if self.momentum is None else self.momentum


def usual_momentum(global_batch_size: int) -> float:
    """Momentum for a global batch; what is missing to 1 is interpolated in the logarithms of both."""
    if global_batch_size <= _MOMENTUM[0][0]:
        return _MOMENTUM[0][1]
    for (smaller, above), (larger, below) in pairwise(_MOMENTUM):
        if global_batch_size <= larger:
            place = math.log(global_batch_size / smaller) / math.log(larger / smaller)
            return 1 - math.exp((1 - place) * math.log(1 - above) + place * math.log(1 - below))
    return _MOMENTUM[-1][1]


class Teacher(nn.Module):
    """Copies of `students` by name, which begin as they are and then follow them."""

    def __init__(self, students: Mapping[str, nn.Module], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.copies = nn.ModuleDict({name: copy.deepcopy(student) for name, student in students.items()})
        self.requires_grad_(requires_grad=False)

    @torch.no_grad()
    def start_from(self, students: Mapping[str, nn.Module], loaded: Collection[str] = ()) -> None:
        """Take the weights of `students` as they are now, but for the parameters of this module named in `loaded`."""
        for name, mine, theirs in self._pairs(students):
            if name not in loaded:
                mine.copy_(theirs)

    @torch.no_grad()
    def follow(self, students: Mapping[str, nn.Module]) -> None:
        """Move towards `students` by one step, after theirs.  # all ranks"""
        for _, mine, theirs in self._pairs(students):
            mine = _held(mine)
            mine.lerp_(_held(theirs).to(mine.dtype), 1 - self.momentum)

    def _pairs(self, students: Mapping[str, nn.Module]) -> list[tuple[str, Any, Any]]:
        return [
            (f"copies.{name}.{parameter}", mine, theirs)
            for name, copied in self.copies.items()
            for (parameter, mine), theirs in zip(
                copied.named_parameters(), students[name].parameters(), strict=True
            )
        ]


def _held(parameter: Tensor) -> Tensor:
    # NOTE: under ZeRO-3 a rank holds a part of each parameter, cut alike in copies; the engine then keeps none whole,
    # as a copy of a whole one would not see the update
    return getattr(parameter, "ds_tensor", parameter)
