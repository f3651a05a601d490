# The compiler gives the types.
# mypy: disable-error-code="no-untyped-def"
"""The loss of each pair summed along rows and along columns, in Triton, on the tiles of `kernel.py`."""

import triton
import triton.language as tl

from kernels.sigmoid_loss.triton.kernel import LN2, LOG2E, _columns, _cosines_that_count, _exp2
from kernels.sigmoid_loss.triton.masking import has_alike, scale_and_bias, tile_of_program


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


@triton.jit(do_not_specialize=["n", "m"])
def score_tile_kernel(
    X, Y, SCALE, BIAS, ROW_SUMS, COLUMN_SUMS, MARKS, PLACES, DEPTHS, n, m, width, weight,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BAND: tl.constexpr, PARTS: tl.constexpr,
    CHECKED: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
    ALIKE: tl.constexpr,
):  # fmt: skip
    """One tile of BN images and BM texts a program, without matching pairs; arguments as of `sigmoid_tile_kernel`.

    ROW_SUMS `[tile columns, n]`, COLUMN_SUMS `[tile rows, m]`, fp32, n and m rounded up to whole tiles: each place is
    written once, so that sums do not depend on the order of programs. Pairs with equal ids are left out, or under
    ALIKE, these alone are added, weight times, to what is there.
    """
    READ: tl.constexpr = not (DESCRIPTORS or INTERPRETED)
    first_row, first_column = tile_of_program(BN, BM, BAND, READ=False)
    if first_column >= m:
        return
    if ALIKE:  # noqa: SIM102 (one is for the compiler, one for the GPU)
        if not has_alike(DEPTHS, BN):
            return
    S = _cosines_that_count(
        X, Y, SCALE, MARKS, PLACES, DEPTHS, first_row, first_column, n, m, width,
        BN, BM, BD, CHECKED, ALIKE, DESCRIPTORS, READ, INTERPRETED,
    )  # fmt: skip
    WIDTH: tl.constexpr = BM // PARTS
    row, column = tl.arange(0, BN), tl.arange(0, WIDTH)
    row_sums = tl.zeros((BN, WIDTH), dtype=tl.float32)
    column_sums = COLUMN_SUMS + (first_row // BN).to(tl.int64) * (tl.cdiv(m, BM) * BM) + first_column
    scale, bias = scale_and_bias(SCALE, BIAS)
    parts = _columns(S, PARTS)
    for part in tl.static_range(PARTS):
        losses = _losses(parts[part] * (scale * LOG2E) + (bias * LOG2E), INTERPRETED)
        row_sums += losses
        at = column_sums + part * WIDTH + column
        sums = tl.sum(losses, axis=0) * LN2
        tl.store(at, weight * sums + tl.load(at) if ALIKE else sums)
    row_at = ROW_SUMS + (first_column // BM).to(tl.int64) * (tl.cdiv(n, BN) * BN) + first_row + row
    sums = tl.sum(row_sums, axis=1) * LN2
    tl.store(row_at, weight * sums + tl.load(row_at) if ALIKE else sums)
