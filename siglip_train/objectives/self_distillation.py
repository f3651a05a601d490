"""Self-distillation from a global view to local views (SILC, arXiv 2310.13355; SigLIP 2, section 2.3)."""

from torch import Tensor

from siglip_train.errors import UserError
from siglip_train.models.flops import image_flops
from siglip_train.objectives.base import StepSizes
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.prototypes import PrototypeObjective


class SelfDistillation(PrototypeObjective):
    """The student sees local views, the teacher the global one; both choose prototypes from the pooled output.

    The term is the mean over images of the mean over their local views. Parameters as in `PrototypeObjective`.
    """

    def flops_per_sample(self, sizes: StepSizes) -> float:
        """The tower on the local views, and the heads."""
        count, tokens = sizes.views.local, sizes.views.local_patches**2
        return count * image_flops(sizes.model.vision, tokens) + self.head_flops(count, 1)

    def forward(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        """Return the sum over this rank's images."""
        if not forward_pass.batch.part("views").local.patches.shape[1]:
            raise UserError("data.views.local=0: self-distillation learns from local views; give at least 1")
        teacher = forward_pass.teacher.pooled  # [B, D]
        local = forward_pass.local_views.pooled.unflatten(0, (len(teacher), -1))  # [B, V, D]
        return {"samples": self.loss(forward_pass, local, teacher) / local.shape[1]}
