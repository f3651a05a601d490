# The compiler gives the types.
# mypy: disable-error-code="no-untyped-def"
"""Pairs of a tile that do not count: their cosines become -2^30 or less, by one more product on the matrix units.

Each image and each text of a tile has a place, and pairs of one place are left out. A place stands for a row of marks,
a table in memory; images' marks times texts' marks are 0 for all other pairs, so these stay what they are, exactly. A
comparison would cost each pair two instructions; this costs a tile with such pairs two tenths of the product at
E = 768, and any other a jump.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# depth of one step of the product, the least that all matrix units take
STEP = tl.constexpr(16)
# a number of the table; in fp16 too it is exact
_MARK = 2.0**15
# A smaller scale would leave pairs of -2^30 in. It counts as this, which changes a logit by less than 1e-6.
LEAST_SCALE = tl.constexpr(2.0**-20)


def marks(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table for tiles of so many rows, `[3, rows + 3, rows + 16]`: of images, texts, texts at a scale below 0.

    Places: 0 to rows - 1 are the tile's images and the texts that match one; then padding among the texts, padding
    among the images, and a text like nothing. Padding meets a mark of its own that all of the other side have.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # what a captured graph makes is there only when it is replayed
        return _make(rows, dtype, device)
    return _kept(rows, dtype, device)


@cache
def _kept(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    table = _make(rows, dtype, device)
    if device.type == "cuda":
        # other streams use it too
        torch.cuda.current_stream(device).synchronize()
    return table


def _make(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    images = torch.eye(rows + 3, rows + STEP.value, dtype=dtype, device=device)
    images[:, rows + 2] = 0
    texts = images.clone()
    images[:, rows] = 1
    texts[:, rows + 1] = 1
    return torch.stack([-_MARK * images, _MARK * texts, -_MARK * texts])


@triton.jit
def scale_and_bias(SCALE, BIAS):
    """As loaded, but the scale at least 2^-20 away from 0."""
    scale = tl.load(SCALE)
    least = tl.where(scale < 0, -LEAST_SCALE, LEAST_SCALE)
    return tl.where(tl.abs(scale) < LEAST_SCALE, least, scale), tl.load(BIAS)


@triton.jit
def places(first_row, first_column, n, m, positives, BN: tl.constexpr, BM: tl.constexpr):
    """Of images `[BN]` and texts `[BM]`, to leave out matching pairs and padding; and whether the tile has any."""
    row, column = tl.arange(0, BN), tl.arange(0, BM)
    match = column + (first_column - first_row - positives)
    match = tl.where((match >= 0) & (match < BN), match, BN + 2)
    on_diagonal = (first_column < first_row + positives + BN) & (first_row + positives < first_column + BM)
    return (
        tl.where(row < n - first_row, row, BN + 1),
        tl.where(column < m - first_column, match, BN),
        on_diagonal | (first_row + BN > n) | (first_column + BM > m),
    )


@triton.jit
def places_of_ids(SORTED, ids, BN: tl.constexpr):
    """Where ids `[M]` are among BN sorted ones: by it, pairs with equal ids are left out.

    A binary search; comparing all pairs would take 2 to 7 instructions each.
    """
    smaller = tl.zeros(ids.shape, dtype=tl.int32)
    step = BN // 2
    while step > 0:
        smaller += tl.where(tl.load(SORTED + smaller + step - 1) < ids, step, 0)
        step //= 2
    return tl.where(tl.load(SORTED + smaller) == ids, smaller, BN + 2)


@triton.jit
def leave_out(
    S, SCALE, MARKS, row_place, column_place, is_special, BN: tl.constexpr, INTERPRETED: tl.constexpr
):
    """S `[BN, BM]` with -2^30 or less added to pairs of one place, if the tile has any (is_special)."""
    WIDTH: tl.constexpr = BN + STEP
    depth = tl.arange(0, STEP)
    texts = MARKS + tl.where(tl.load(SCALE) < 0, 2, 1) * ((BN + 3) * WIDTH)
    row_at = MARKS + (row_place[:, None] * WIDTH + depth[None, :])
    column_at = texts + (column_place[:, None] * WIDTH + depth[None, :])
    # no loop of one stage: the compiler would unroll it
    for _ in tl.range(0, tl.where(is_special, WIDTH, 0), STEP, num_stages=2):
        x, y = tl.load(row_at), tl.load(column_at)
        if INTERPRETED:
            x, y = x.to(tl.float32), y.to(tl.float32)
        S = tl.dot(x, y.T, S, input_precision="ieee")
        row_at += STEP
        column_at += STEP
    return S
