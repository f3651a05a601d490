"""The vision tower: patches with grid positions and an optional mask in, tokens and a pooled vector out.

A fixed resolution is the case without a mask; there is no second tower for variable grids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from siglip_train.batch import Images
from siglip_train.errors import UserError
from siglip_train.models.layers import AttentionPool, Encoder, Gelu, check_sizes, init_lecun
from siglip_train.models.positions import resample_positions


@dataclass
class VisionConfig:
    """Sizes of the vision tower.

    image_size: side of the square input in pixels; what exceeds a multiple of `patch_size` is dropped.
    patch_size: side of a patch in pixels. width: of a token, and of the embedding. depth: transformer blocks.
    mlp_dim: width inside an MLP. heads: of attention, a divisor of `width`.
    pool: "map" = attention with a learned probe, "cls" = a learned token in front, "average" = token mean.
    gelu: "tanh" in big_vision and HF; "erf" in several open_clip models.
    position_grid: side of the learned position table; None = `image_size // patch_size`.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    heads: int = 12
    pool: Literal["map", "cls", "average"] = "map"
    gelu: Gelu = "tanh"
    position_grid: int | None = None

    def __post_init__(self) -> None:
        check_sizes("vision", self)
        if self.image_size < self.patch_size:
            raise UserError(
                f"model.vision: image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along a side of the square image."""
        return self.image_size // self.patch_size

    @property
    def table_side(self) -> int:
        """Side of the learned position table."""
        return self.position_grid or self.grid

    @property
    def patch_values(self) -> int:
        """Values in a patch (P)."""
        return self.patch_size**2 * 3


class VisionFeatures(NamedTuple):
    """Output of the vision tower.

    tokens: `[B, L, D]` after the final LayerNorm; meaningless where `mask` is False. pooled: `[B, D]`, not
    normalised. mask: `[B, L]` bool or None, as it came in.
    """

    tokens: Tensor
    pooled: Tensor
    mask: Tensor | None


def patchify(pixels: Tensor, patch_size: int) -> Images:
    """Cut `[B, 3, H, W]` into patches; rows and columns beyond a multiple of `patch_size` are dropped.

    Returns patches `[B, L, P]` of the same dtype, row-major, values in (row, column, channel) order.
    """
    batch, _, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    cut = pixels[:, :, : rows * patch_size, : columns * patch_size]
    cut = cut.reshape(batch, 3, rows, patch_size, columns, patch_size)
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    grid = torch.cartesian_prod(
        torch.arange(rows, device=pixels.device), torch.arange(columns, device=pixels.device)
    )
    return Images(patches, grid.expand(batch, -1, -1))


class VisionTower(nn.Module):
    """Pre-LN vision transformer with a linear stem and learned positions (SigLIP, SigLIP 2 incl. NaFlex)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embedding = nn.Linear(config.patch_values, width)
        self.position_table = nn.Parameter(torch.empty(config.table_side**2, width))
        self.encoder = Encoder(config.depth, width, config.mlp_dim, config.heads, config.gelu)
        if config.pool == "map":
            self.pool = AttentionPool(width, config.mlp_dim, config.heads, config.gelu)
        elif config.pool == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:
        """Initial values of stem, positions and class token."""
        init_lecun(self.patch_embedding, generator)
        std = 1 / math.sqrt(self.config.width)
        nn.init.normal_(self.position_table, std=std, generator=generator)
        if self.config.pool == "cls":
            nn.init.zeros_(self.cls_token)

    def forward(
        self,
        patches: Tensor,
        grid: Tensor,
        mask: Tensor | None = None,
        *,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> VisionFeatures:
        """patches `[B, L, P]` (uint8 or -1..1), grid `[B, L, 2]`, mask `[B, L]` or None; see `Images`.

        change: what is done to the embedded patches `[B, L, D]` before positions are added (masked prediction).
        """
        tokens = self._embed(patches, grid, mask, change)
        if self.config.pool == "cls":
            return self._encode_with_class_token(tokens, mask)
        tokens = self.encoder(tokens, mask)  # [B, L, D]
        pooled = self.pool(tokens, mask) if self.config.pool == "map" else _mean_of_real(tokens, mask)
        return VisionFeatures(tokens, pooled, mask)

    def layer_tokens(self, images: Images, layer: int) -> Tensor:
        """Tokens `[B, L, D]` of the patches after block `layer`, as language models take them, without pooling.

        layer: 0 = the embedded patches, `depth` = after the last block, negative = from the end: -1 the last block, -2
        the one before, which LLaVA takes. The final LayerNorm is not applied; `forward(...).tokens` is with it.
        Raises `UserError` for a layer that is not there, and for a tower with a class token.
        """
        depth = self.config.depth
        if not -depth - 1 <= layer <= depth or self.config.pool == "cls":
            raise UserError(
                f"layer {layer} cannot be taken of a tower of {depth} blocks, pool {self.config.pool}"
            )
        count = layer if layer >= 0 else depth + 1 + layer
        return self.encoder.run_blocks(self._embed(*images), count, images.mask)

    def _embed(
        self,
        patches: Tensor,
        grid: Tensor,
        mask: Tensor | None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        assert patches.shape[-1] == self.config.patch_values, (patches.shape, self.config.patch_values)
        if not patches.is_floating_point():
            # on the device, so that a quarter of the bytes travel there
            patches = patches.to(self.position_table.dtype) / 127.5 - 1
        embedded = self.patch_embedding(patches)
        if change is not None:
            embedded = change(embedded)
        return embedded + resample_positions(self.position_table, grid, mask)

    def _encode_with_class_token(self, tokens: Tensor, mask: Tensor | None) -> VisionFeatures:
        class_token = self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype)
        key_mask = None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
        encoded = self.encoder(torch.cat([class_token, tokens], dim=1), key_mask)  # [B, 1 + L, D]
        return VisionFeatures(encoded[:, 1:], encoded[:, 0], mask)


def _mean_of_real(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.to(tokens.dtype)[..., None]  # [B, L, 1]
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
