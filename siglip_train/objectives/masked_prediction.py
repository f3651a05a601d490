"""Masked prediction of patch features (iBOT; TIPS, arXiv 2410.16512; SigLIP 2, section 2.3)."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.profiler import record_function

from siglip_train.errors import UserError
from siglip_train.models.flops import image_flops
from siglip_train.objectives.base import StepSizes
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.prototypes import PrototypeObjective


class MaskToken(nn.Module):
    """A learned vector in place of embedded patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(width))
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:  # noqa: ARG002  # that of all modules
        """Zeros, as in DINOv2."""
        nn.init.zeros_(self.token)

    def forward(self, embedded: Tensor, masked: Tensor) -> Tensor:
        """embedded `[B, L, D]`, masked `[B, L]` bool -> `[B, L, D]`."""
        return torch.where(masked[..., None], self.token.to(embedded.dtype), embedded)


class MaskedPrediction(PrototypeObjective):
    """Both see the same global view, of which the student's patches are masked in part, before positions are added.

    The term is the mean over images of the mean over the patches that count. tokens: masked = those that the student
    does not see (iBOT, SigLIP 2), all = every patch (TIPSv2). head_of: the name of the self-distillation whose head, of
    as many prototypes, is this one's too (`hidden` and `bottleneck` are its then); null = a head of its own. Other
    parameters as in `PrototypeObjective`.
    """

    def __init__(
        self,
        *,
        width: int,
        tokens: Literal["masked", "all"] = "masked",
        head_of: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(width=width, **options)
        self.head_of = head_of
        if head_of is not None:
            del self.head
            self._heads, self.averaged = [], ()
        if tokens not in ("masked", "all"):
            raise ValueError(f"tokens is {tokens!r}: choose masked or all")
        self.tokens = tokens
        self.mask_token = MaskToken(width)

    def share_among(self, objectives: Mapping[str, nn.Module]) -> None:
        """Take the head of the objective that `head_of` names. Raises `UserError`."""
        if self.head_of is None or self._heads:
            return
        owner = objectives.get(self.head_of)
        if not isinstance(owner, PrototypeObjective) or not hasattr(owner, "head"):
            raise UserError(f"head_of={self.head_of}: the run has no objective of that name with prototypes")
        if owner.centre.shape != self.centre.shape:
            raise UserError(
                f"head_of={self.head_of}: that head has {len(owner.centre)} prototypes, and this objective "
                f"{len(self.centre)}: give both the same sizes"
            )
        self._heads = [owner.head]

    def flops_per_sample(self, sizes: StepSizes) -> float:
        """The tower on the masked view, and the heads."""
        tokens = sizes.model.vision.grid**2
        rows = round(sizes.views.masked * tokens) if self.tokens == "masked" else tokens
        return image_flops(sizes.model.vision, tokens) + self.head_flops(rows, rows)

    def forward(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        """Return the sum over this rank's images."""
        whole, _, masked = forward_pass.batch.part("views")  # masked [B, M]
        if not masked.shape[1]:
            raise UserError("data.views.masked leaves no patch of an image to predict; give a larger share")
        unseen = torch.zeros(whole.patches.shape[:2], dtype=torch.bool, device=masked.device)
        unseen.scatter_(1, masked, value=True)  # [B, L]
        with record_function("forward/masked_view"):
            student = forward_pass.model.vision(
                *whole, change=partial(self.mask_token, masked=unseen)
            ).tokens  # [B, L, D]
        teacher = forward_pass.teacher.tokens
        if self.tokens == "masked":
            student, teacher = _at(student, masked), _at(teacher, masked)  # [B, M, D]
        total = self.loss(forward_pass, student.flatten(0, 1)[:, None], teacher.flatten(0, 1))
        return {"samples": total / student.shape[1]}


def _at(tokens: Tensor, places: Tensor) -> Tensor:
    """tokens `[B, L, D]` at places `[B, M]` -> `[B, M, D]`."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
