# The compiler gives the types.
# mypy: disable-error-code="no-untyped-def"
"""The loss of each pair summed along rows and along columns, in Triton, on the tiles of `kernel.py`."""

import triton
import triton.language as tl

from kernels.sigmoid_loss.kernel import LN2, LOG2E, _columns, _cosines, _exp2, _tile_of_program
from kernels.sigmoid_loss.left_out import leave_out, places, places_of_ids, scale_and_bias


@triton.jit
def _log2_of_1_plus(q):
    """For q from 0 to 1, to 2e-7 of itself: q times the polynomial of least relative error (Remez), 8 instructions."""
    p = 0.06360787153244019 - q * 0.012319467030465603
    p = 0.25600969791412354 - q * (0.15535184741020203 - q * p)
    p = 0.48006370663642883 - q * (0.3533948063850403 - q * p)
    return q * (1.4426947832107544 - q * (0.7213100790977478 - q * p))


@triton.jit
def _losses(logits, INTERPRETED: tl.constexpr):
    """Of each pair, in units of ln 2 like the logits. One by one: sums of two directions share no product."""
    return tl.maximum(logits, 0.0) + _log2_of_1_plus(_exp2(-tl.abs(logits), INTERPRETED))


@triton.jit(do_not_specialize=["n", "m", "positives"])
def score_tile_kernel(
    X, Y, SCALE, BIAS, ROW_SUMS, COLUMN_SUMS, MARKS, X_IDS, SORTED, Y_IDS, n, m, width, positives, weight,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BAND: tl.constexpr, PARTS: tl.constexpr,
    CHECKED: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
    HAS_IDS: tl.constexpr,
):  # fmt: skip
    """One tile of BN images and BM texts a program, without matching pairs; arguments as of `sigmoid_tile_kernel`.

    ROW_SUMS `[tile columns, n]`, COLUMN_SUMS `[tile rows, m]`, fp32, n and m rounded up to whole tiles: each place is
    written once, so that sums do not depend on the order of programs.
    """
    first_row, first_column = _tile_of_program(BN, BM, BAND)
    if first_column >= m:
        return
    S = _cosines(X, Y, first_row, first_column, n, m, width, BN, BM, BD, DESCRIPTORS, INTERPRETED)
    if CHECKED:
        row_place, column_place, is_special = places(first_row, first_column, n, m, positives, BN, BM)
        S = leave_out(S, SCALE, MARKS, row_place, column_place, is_special, BN, INTERPRETED)
    WIDTH: tl.constexpr = BM // PARTS
    row, column = tl.arange(0, BN), tl.arange(0, WIDTH)
    if HAS_IDS:
        column_place = places_of_ids(SORTED + first_row, tl.load(Y_IDS + first_column + tl.arange(0, BM)), BN)
        has_alike = tl.min(column_place) < BN
    row_sums = tl.zeros((BN, WIDTH), dtype=tl.float32)
    column_sums = COLUMN_SUMS + (first_row // BN).to(tl.int64) * (tl.cdiv(m, BM) * BM) + first_column
    scale, bias = scale_and_bias(SCALE, BIAS)
    parts = _columns(S, PARTS)
    for part in tl.static_range(PARTS):
        left = first_column + part * WIDTH
        losses = _losses(parts[part] * (scale * LOG2E) + (bias * LOG2E), INTERPRETED)
        if HAS_IDS:  # noqa: SIM102 (one is for the compiler, one for the GPU)
            if has_alike:
                alike = tl.load(X_IDS + first_row + row)[:, None] == tl.load(Y_IDS + left + column)[None, :]
                losses = tl.where(alike, weight * losses, losses)
        row_sums += losses
        tl.store(column_sums + part * WIDTH + column, tl.sum(losses, axis=0) * LN2)
    row_at = ROW_SUMS + (first_column // BM).to(tl.int64) * (tl.cdiv(n, BN) * BN) + first_row + row
    tl.store(row_at, tl.sum(row_sums, axis=1) * LN2)
