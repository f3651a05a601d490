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
_MARK = tl.constexpr(2.0**15)
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
    mark = _MARK.value
    images = torch.eye(rows + 3, rows + STEP.value, dtype=dtype, device=device)
    images[:, rows + 2] = 0
    texts = images.clone()
    images[:, rows] = 1
    texts[:, rows + 1] = 1
    return torch.stack([-mark * images, mark * texts, -mark * texts])


@triton.jit
def place_in_grid(READ: tl.constexpr):
    """Indices of this program. READ: from the GPU's registers for them, else from those that the compiler keeps.

    Where registers are short, all through a kernel is too long to keep two numbers that are needed again at its end.
    """
    if READ:
        x = tl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        y = tl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid.y;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        return x, y
    else:
        return tl.program_id(0), tl.program_id(1)


@triton.jit
def tile_of_program(BN: tl.constexpr, BM: tl.constexpr, BAND: tl.constexpr, READ: tl.constexpr):
    """First row and column. Programs that run together share a band of BAND tile columns, which stay in the cache, as
    all rows of a chunk do. One band for each second index of the grid: dividing by its size would take 60 instructions.
    """
    place, band = place_in_grid(READ)
    return place // BAND * BN, (band * BAND + place % BAND) * BM


@triton.jit
def number_of_program(READ: tl.constexpr):
    place, band = place_in_grid(READ)
    return band.to(tl.int64) * tl.num_programs(0) + place


@triton.jit
def scale_and_bias(SCALE, BIAS):
    """As loaded, but the scale at least 2^-20 away from 0."""
    scale = tl.load(SCALE)
    least = tl.where(scale < 0, -LEAST_SCALE, LEAST_SCALE)
    return tl.where(tl.abs(scale) < LEAST_SCALE, least, scale), tl.load(BIAS)


@triton.jit(do_not_specialize=["n", "m", "positives"])
def place_kernel(
    SCALE, X_IDS, SORTED, Y_IDS, PLACES, DEPTHS, n, m, positives,
    BN: tl.constexpr, BM: tl.constexpr, BAND: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Goes before a kernel of tiles, a program for each of its programs: which of the tile's pairs do not count.

    positives: row i matches column i + positives; m or more for none. HAS_IDS: X_IDS, Y_IDS are int32 for whole tiles,
    SORTED the former in order within each tile; else these three are not used. DEPTHS `[programs]`, int32: how deep the
    tile's product of marks is: 0, a table's width, or twice that if pairs have equal ids. PLACES
    `[programs, 2, BN + BM]`, int16, of images, then of texts: for matching pairs and padding, then for ids; written if
    the depth is not 0.
    """
    WIDTH: tl.constexpr = BN + STEP
    first_row, first_column = tile_of_program(BN, BM, BAND, READ=False)
    program = number_of_program(READ=False)
    row, column = tl.arange(0, BN), tl.arange(0, BM)
    rows_at = PLACES + program * (2 * (BN + BM)) + row
    columns_at = PLACES + program * (2 * (BN + BM)) + BN + column
    first_text = _first_text(SCALE, BN)
    on_diagonal = (first_column < first_row + positives + BN) & (first_row + positives < first_column + BM)
    sticks_out = (first_row + BN > n) | (first_column + BM > m)
    depth = tl.where(on_diagonal | sticks_out, WIDTH, 0)
    if HAS_IDS:
        # programs beyond the last column find no ids
        ids = tl.load(Y_IDS + first_column + column, mask=first_column + column < m, other=-2)
        sorted_ids = SORTED + first_row
        column_place = _place_of_ids(sorted_ids, ids, BN)
        if tl.min(column_place) < BN:
            depth = tl.full((), 2 * WIDTH, tl.int32)
            tl.store(rows_at + BN + BM, _place_of_ids(sorted_ids, tl.load(X_IDS + first_row + row), BN))
            tl.store(columns_at + BN + BM, first_text + column_place)
    tl.store(DEPTHS + program, depth)
    if depth > 0:
        match = column + (first_column - first_row - positives)
        match = tl.where((match >= 0) & (match < BN), match, BN + 2)
        tl.store(rows_at, tl.where(row < n - first_row, row, BN + 1))
        tl.store(columns_at, first_text + tl.where(column < m - first_column, match, BN))


@triton.jit
def _first_text(SCALE, BN: tl.constexpr):
    """The row of the table where marks of texts begin, for a scale of this sign."""
    return tl.where(tl.load(SCALE) < 0, 2, 1) * (BN + 3)


@triton.jit
def _place_of_ids(SORTED, ids, BN: tl.constexpr):
    """Where ids `[M]` are among BN sorted ones, by a binary search; texts without their like get the place for that."""
    smaller = tl.zeros(ids.shape, dtype=tl.int32)
    step = BN // 2
    while step > 0:
        smaller += tl.where(tl.load(SORTED + smaller + step - 1) < ids, step, 0)
        step //= 2
    return tl.where(tl.load(SORTED + smaller) == ids, smaller, BN + 2)


@triton.jit
def leave_out(
    S, MARKS, PLACES, DEPTHS, READ: tl.constexpr, INTERPRETED: tl.constexpr, INVERTED: tl.constexpr
):  # fmt: skip
    """S `[BN, BM]` with -2^30 or less added to pairs of one place, if the tile has any.

    PLACES, DEPTHS: as `place_kernel` writes them. INVERTED: pairs of one place get 2^30 for that if it is by their ids.
    READ: see `place_in_grid`.
    """
    BN: tl.constexpr = S.shape[0]
    BM: tl.constexpr = S.shape[1]
    WIDTH: tl.constexpr = BN + STEP
    mark = tl.arange(0, STEP)
    program = number_of_program(READ)
    # places are read in each step: kept from one to the next, they take registers that S needs
    for start in tl.range(0, tl.load(DEPTHS + program), STEP, num_stages=1):
        turn = tl.where(start >= WIDTH, 1, 0)
        places = PLACES + (2 * program + turn) * (BN + BM)
        row_place = tl.load(places + tl.arange(0, BN)).to(tl.int32)
        column_place = tl.load(places + BN + tl.arange(0, BM)).to(tl.int32)
        at = MARKS + (start - turn * WIDTH)
        x = tl.load(at + (row_place[:, None] * WIDTH + mark[None, :]))
        y = tl.load(at + (column_place[:, None] * WIDTH + mark[None, :]))
        if INTERPRETED:
            x, y = x.to(tl.float32), y.to(tl.float32)
        if INVERTED:
            x = tl.where(turn == 1, -x, x)
        S = tl.dot(x, y.T, S, input_precision="ieee")
    return S


@triton.jit
def has_alike(DEPTHS, BN: tl.constexpr):
    """Whether the program's tile has pairs with equal ids."""
    return tl.load(DEPTHS + number_of_program(READ=False)) > BN + STEP


@triton.jit
def only_alike(
    SCALE, MARKS, PLACES, DEPTHS, BN: tl.constexpr, BM: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """What the cosines of a tile are added to, to leave out all but pairs with equal ids that do not match: 0 there."""
    S = tl.full((BN, BM), -_MARK * _MARK, tl.float32) * tl.where(tl.load(SCALE) < 0, -1.0, 1.0)
    return leave_out(S, MARKS, PLACES, DEPTHS, READ=False, INTERPRETED=INTERPRETED, INVERTED=True)
