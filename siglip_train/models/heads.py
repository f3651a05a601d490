"""The head that turns features into a choice of prototypes, for self-distillation and masked prediction (DINO)."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional


class Projected(NamedTuple):
    """bottleneck: features as unit vectors `[..., D]`. prototypes: unit vectors `[K, D]`. Both in fp32."""

    bottleneck: Tensor
    prototypes: Tensor


class ProjectionHead(nn.Module):
    """Three linear layers with GELU between them, a unit bottleneck, and prototypes of unit length.

    As in DINO (arXiv 2104.14294, appendix C) with the last layer's lengths fixed at 1; logits are the cosines of
    bottleneck and prototypes, which `kernels.prototype_cross_entropy` takes without making them all at once.

    width: of the features. hidden: of the layers between. bottleneck: D. prototypes: K.
    """

    def __init__(
        self, width: int, *, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 32768
    ) -> None:
        super().__init__()
        if min(width, hidden, bottleneck, prototypes) < 1:
            raise ValueError(
                f"a head of hidden={hidden}, bottleneck={bottleneck}, prototypes={prototypes} on width {width}: give "
                "sizes of at least 1"
            )
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:
        """Normal values of deviation 0.02, cut at two of it, zero biases; the prototypes' length does not matter."""
        for linear in (self.fc1, self.fc2, self.fc3):
            nn.init.trunc_normal_(linear.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.prototypes, generator=generator)

    @property
    def flops(self) -> float:
        """Operations of a forward for one row, the products with the prototypes included."""
        return 2.0 * (
            sum(linear.weight.numel() for linear in (self.fc1, self.fc2, self.fc3)) + self.prototypes.numel()
        )

    def forward(self, features: Tensor) -> Projected:
        """features `[..., width]`."""
        hidden = functional.gelu(self.fc2(functional.gelu(self.fc1(features))))
        bottleneck = self.fc3(hidden)
        # lengths in 16 bits would turn the cosines that the teacher's temperature multiplies by 25
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(bottleneck.dtype, torch.float32)
            return Projected(
                functional.normalize(bottleneck.to(dtype), dim=-1),
                functional.normalize(self.prototypes, dim=-1),
            )
