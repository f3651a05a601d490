"""One learned table of positions, read at any grid: in the forward pass (NaFlex) or once, at load time.

Explicit separable weights instead of `interpolate(antialias=True)`: its CPU version is wrong for a grid one
column wide, and it would need each image's grid size on the host.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


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


def resize_position_table(table: Tensor, side: int) -> Tensor:
    """Table `[n * n, D]` -> `[side * side, D]`: bilinear with the corners aligned, no antialiasing.

    Used once, when a fixed-resolution model starts from weights of another resolution: big_vision's
    convention for that, and not the one of `resample_positions`.
    """
    old = math.isqrt(len(table))
    image = table.T.reshape(1, -1, old, old)
    resized = functional.interpolate(image, (side, side), mode="bilinear", align_corners=True)
    return resized.flatten(2)[0].T.contiguous()
