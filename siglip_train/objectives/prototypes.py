"""What the two self-supervised objectives share: a head, the centre of the teacher's logits, and a look at collapse."""

import logging
import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.profiler import record_function

from kernels import prototype_cross_entropy
from kernels.prototype_cross_entropy import Temperatures
from siglip_train.data.inputs.base import Input
from siglip_train.data.inputs.views import ViewsInput
from siglip_train.distributed.collectives import is_distributed
from siglip_train.models.heads import ProjectionHead
from siglip_train.objectives.base import Objective
from siglip_train.objectives.forward_pass import ForwardPass

log = logging.getLogger(__name__)

# of the entropy that prototypes used equally often have; below it few are used, and the loss teaches nothing more
_COLLAPSED = 0.1


class PrototypeObjective(Objective):
    """Cross-entropy between the teacher's choice of prototypes and the student's (DINO, arXiv 2104.14294, section 3.1).

    The teacher's logits are centred by the running mean of all ranks and micro-batches, and sharpened by a lower
    temperature. Softmax, centre and loss are in fp32.

    width: of the tower. hidden, bottleneck, prototypes: of `ProjectionHead`. teacher_temperature,
    student_temperature: what logits are divided by. centre_momentum: share of the centre that a step keeps.
    """

    inputs: tuple[type[Input], ...] = (ViewsInput,)
    averaged: tuple[str, ...] = ("head",)

    def __init__(
        self,
        *,
        width: int,
        weight: float = 1.0,
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 32768,
        teacher_temperature: float = 0.04,
        student_temperature: float = 0.1,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__(weight=weight)
        if not 0 < teacher_temperature <= student_temperature < math.inf:
            raise ValueError(
                f"teacher_temperature is {teacher_temperature} and student_temperature {student_temperature}: give "
                "numbers above 0, the teacher's the lower one, as its sharper choice is what keeps both from collapse"
            )
        if not 0 <= centre_momentum < 1:
            raise ValueError(f"centre_momentum is {centre_momentum}: give a share of at least 0 and below 1")
        self.temperatures = Temperatures(student_temperature, teacher_temperature)
        self.centre_momentum = centre_momentum
        self.head = ProjectionHead(width, hidden=hidden, bottleneck=bottleneck, prototypes=prototypes)
        # in a list, so that one of another objective is a submodule, saved and averaged, of its owner alone
        self._heads = [self.head]
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(prototypes))
        # of the step that is under way: the teacher's logits, choices, features and rows, summed
        self._seen: Tensor | None = None
        # of the last step and all ranks, means over rows
        self._use: Tensor | None = None
        self._mean_feature: Tensor | None = None
        self._has_warned = False

    def head_flops(self, student_rows: float, teacher_rows: float) -> float:
        """Operations of a step in the heads for an image of so many rows: three passes here, one of the teacher's."""
        return (3 * student_rows + teacher_rows) * self._heads[0].flops

    def loss(
        self, forward_pass: ForwardPass, student: Tensor, teacher: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The weighted sum over R rows of the teacher and V views of each.

        student: features `[R, V, D]`. teacher: features `[R, D]`. weights: `[R, V]`, None = 1.
        """
        mine = self._heads[0](student)
        with torch.no_grad():
            theirs = forward_pass.teacher_of(self._heads[0])(teacher)
        with record_function("objective/prototypes"):
            sums = prototype_cross_entropy(
                mine.bottleneck,
                mine.prototypes,
                theirs.bottleneck,
                theirs.prototypes,
                self.centre,
                temperatures=self.temperatures,
                weights=weights,
            )
        if torch.is_grad_enabled():
            spread = functional.normalize(teacher.detach().to(self.centre.dtype), dim=-1).sum(0)
            rows = spread.new_full((1,), len(teacher))
            seen = torch.cat([sums.logits.to(spread.dtype), sums.shares.to(spread.dtype), spread, rows])
            self._seen = seen if self._seen is None else self._seen + seen
        return sums.loss

    def after_step(self) -> None:
        """Move the centre to the mean of the teacher's logits, and note how it uses the prototypes.  # all ranks"""
        assert self._seen is not None, "a step has had a forward"
        seen, self._seen = self._seen, None
        if is_distributed():
            dist.all_reduce(seen)
        count = len(self.centre)
        logits, shares, features, rows = seen.split([count, count, len(seen) - 2 * count - 1, 1])
        self.centre.lerp_(logits / rows, 1 - self.centre_momentum)
        self._use, self._mean_feature = shares / rows, features / rows

    def metrics(self) -> dict[str, float]:
        """Two signs of collapse, each 1 at best and 0 when there is nothing left to learn; a warning at the first.

        prototype_entropy: of how often the teacher's choices fall on each prototype, over that of equal use.
        feature_spread: 1 minus the squared length of the mean of its features as unit vectors.
        """
        if self._use is None or self._mean_feature is None:
            return {}
        entropy = torch.special.entr(self._use).sum() / math.log(max(2, len(self._use)))
        spread = 1 - self._mean_feature.square().sum()
        found = {"prototype_entropy": entropy.item(), "feature_spread": spread.item()}
        if found["prototype_entropy"] < _COLLAPSED and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the teacher's choices fall on few of the %d prototypes (entropy %.2f of 1): its features may have "
                "collapsed; a higher teacher_temperature, a higher ema.momentum or a lower weight helps",
                len(self._use),
                found["prototype_entropy"],
            )
        return found
