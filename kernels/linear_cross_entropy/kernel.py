# The compiler gives the types.
# mypy: disable-error-code="no-untyped-def"
"""The kernel in Triton: a program turns a row of logits into its loss and, if wanted, into the gradient of the row.

Letters: G = factor * (softmax - one-hot). The row is read twice, as it does not fit on the chip: once for its peak and
its sum of exponentials, together, and once more for G.
"""

import triton
import triton.language as tl

# lower than any logit and finite, so that differences of two such peaks are 0 and not NaN
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _logits(LOGITS, BIAS, column, width, HAS_BIAS: tl.constexpr, CHECKED: tl.constexpr):
    """A block of the row; beyond its end, what adds nothing to the sum."""
    if CHECKED:
        x = tl.load(LOGITS + column, mask=column < width, other=float("-inf"))
        if HAS_BIAS:
            x += tl.load(BIAS + column, mask=column < width, other=0.0)
    else:
        x = tl.load(LOGITS + column)
        if HAS_BIAS:
            x += tl.load(BIAS + column)
    return x


@triton.jit
def _with_block(peaks, sums, x, is_target):
    """Peaks and sums of exponentials, a lane each, after one more block of logits; the target is not in the sums."""
    higher = tl.maximum(peaks, x)
    e = tl.where(is_target, 0.0, tl.exp(x - higher))
    return higher, sums * tl.exp(peaks - higher) + e


@triton.jit
def _log1p(q):
    # what 1 + q rounds away is put back by the quotient (Kahan)
    sum = 1.0 + q
    return tl.where(sum == 1.0, q, tl.log(sum) * (q / tl.where(sum == 1.0, 1.0, sum - 1.0)))


@triton.jit
def _rounded(g, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    # by hand, because the interpreter cuts bf16 off, and makes something of what is left of a 0
    if INTERPRETED and dtype == tl.bfloat16:
        bits = g.to(tl.int32, bitcast=True)
        g = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return g.to(dtype)


@triton.jit
def _slopes(x, is_target, peak, others, share, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    g = tl.where(is_target, -others, tl.exp(x - peak)) * share
    return _rounded(g, dtype, INTERPRETED)


@triton.jit(do_not_specialize=["width"])
def softmax_kernel(
    LOGITS, BIAS, TARGETS, FACTORS, G, LOSSES, width, stride_logits, stride_g,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, GRADIENTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row a program. LOGITS `[c, width]`, fp32; G the same shape in any dtype, and may be LOGITS itself.

    BIAS `[width]`, FACTORS `[c]`, LOSSES `[c]`: fp32. TARGETS `[c]`: int64, within the row. Row strides are in
    elements. Each lane keeps a peak and a sum of its own; they are joined once, after the loop. The target is left out
    of the sums, so that a token that fits keeps the digits of its small loss and slopes.
    """
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride_logits
    target = tl.load(TARGETS + row).to(tl.int32)
    target_logit = tl.load(LOGITS + target)
    if HAS_BIAS:
        target_logit += tl.load(BIAS + target)
    lane = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    # whole blocks without a mask, which would split their loads into single numbers
    end = width // BLOCK * BLOCK
    for start in range(0, end, BLOCK):
        x = _logits(LOGITS, BIAS, start + lane, width, HAS_BIAS, CHECKED=False)
        peaks, sums = _with_block(peaks, sums, x, start + lane == target)
    x = _logits(LOGITS, BIAS, end + lane, width, HAS_BIAS, CHECKED=True)
    peaks, sums = _with_block(peaks, sums, x, end + lane == target)
    peak = tl.max(peaks)
    others = tl.sum(sums * tl.exp(peaks - peak))
    of_target = tl.exp(target_logit - peak)
    tl.store(LOSSES + row, (peak - target_logit) + _log1p(others + (of_target - 1.0)))
    if GRADIENTS:
        G += row * stride_g
        dtype: tl.constexpr = G.dtype.element_ty
        share = tl.load(FACTORS + row) / (others + of_target)
        for start in range(0, end, BLOCK):
            x = _logits(LOGITS, BIAS, start + lane, width, HAS_BIAS, CHECKED=False)
            g = _slopes(x, start + lane == target, peak, others, share, dtype, INTERPRETED)
            tl.store(G + start + lane, g)
        x = _logits(LOGITS, BIAS, end + lane, width, HAS_BIAS, CHECKED=True)
        g = _slopes(x, end + lane == target, peak, others, share, dtype, INTERPRETED)
        tl.store(G + end + lane, g, mask=end + lane < width)
