"""One learned table of positions, read at any grid: in the forward pass (NaFlex) or once, at load time.

Explicit separable weights instead of `interpolate(antialias=True)`: its CPU version is wrong for a grid one
column wide, and it would need each image's grid size on the host.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

# How a table is resized at load time. corner_aligned: bilinear, big_vision for fixed resolutions (SigLIP 2, section
# 2.4.1). half_pixel: bilinear, antialiased, NaFlex. bicubic: HuggingFace. bicubic_antialiased: timm, so open_clip.
Resampling = Literal["corner_aligned", "half_pixel", "bicubic", "bicubic_antialiased"]

_INTERPOLATIONS: dict[str, dict[str, Any]] = {
    "corner_aligned": {"mode": "bilinear", "align_corners": True},
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "bicubic_antialiased": {"mode": "bicubic", "align_corners": False, "antialias": True},
}


def axis_weights(index: Tensor, length: Tensor, size: int) -> Tensor:
    """Weights `[..., size]` with which place `index` of an axis of `length` places reads a table of `size`.

    Bilinear with half-pixel centres, antialiased where the axis is shorter than the table, renormalised at
    the edges. index and length broadcast against each other.
    """
    scale = size / length  # table places per place of the grid
    support = scale.clamp(min=1)  # the triangle grows when shrinking: that is the antialiasing
    centre = (index + 0.5) * scale - 0.5
    table_places = torch.arange(size, device=index.device)
    distance = (table_places - centre[..., None]).abs() / support[..., None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def resample_positions(table: Tensor, grid: Tensor, mask: Tensor | None = None) -> Tensor:
    """Positions of patches on any grid, from a square table, in fp32 or better (SigLIP 2, section 2.4.2).

    table: `[n * n, D]`, row-major. grid: `[B, L, 2]` int, (row, column) of each patch. mask: `[B, L]` bool.
    Each image's grid is as large as its largest coordinates say, so nothing waits for the device. Padding
    gets the position of the first patch.

    Returns `[B, L, D]`; without a mask `[L, D]`, as then all images have the grid of the first.
    """
    side = math.isqrt(len(table))
    grid = grid[0] if mask is None else grid * mask[..., None]
    size = grid.amax(dim=-2, keepdim=True) + 1  # [..., 1, 2]
    dtype = torch.promote_types(table.dtype, torch.float32)
    place, extent = grid.to(dtype), size.to(dtype)
    rows = axis_weights(place[..., 0], extent[..., 0], side)  # [..., L, n]
    columns = axis_weights(place[..., 1], extent[..., 1], side)
    weights = (rows[..., :, None] * columns[..., None, :]).flatten(-2)  # [..., L, n * n]
    with torch.autocast(table.device.type, enabled=False):
        return weights @ table.to(dtype)


def resize_position_table(table: Tensor, side: int, convention: Resampling = "corner_aligned") -> Tensor:
    """Table `[n * n, D]` -> `[side * side, D]` in fp32: once, when weights of another resolution are a start.

    Conventions differ by O(1) on random tables; see `Resampling`.
    """
    if convention == "half_pixel":
        places = torch.arange(side, device=table.device)
        return resample_positions(table, torch.cartesian_prod(places, places)[None])
    old = math.isqrt(len(table))
    image = table.float().T.reshape(1, -1, old, old)
    resized = functional.interpolate(image, (side, side), **_INTERPOLATIONS[convention])
    return resized.flatten(2)[0].T.contiguous()
