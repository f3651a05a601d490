# The compiler gives the types.
# mypy: disable-error-code="no-untyped-def"
"""The two kernels in Triton: one does the n m E work on tiles of pairs, the other finishes rows and matching pairs.

Letters: X images, Y texts, S = X Y' cosines, G = sigmoid(logits), all of one tile. Logits are in units of ln 2, because
the machine's exponential and logarithm have base 2.
"""

import triton
import triton.language as tl

from kernels.sigmoid_loss.triton.masking import (
    has_alike,
    leave_out,
    number_of_program,
    only_alike,
    scale_and_bias,
    tile_of_program,
)

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# below it, log(1 + q) is its series: 1 + q would round q away
SERIES = tl.constexpr(0.0625)


@triton.jit
def _exp2(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _reciprocal(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _log2(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _log1p(q, INTERPRETED: tl.constexpr):
    series = q * (1.0 - q * (0.5 - q * (0.33333334 - q * (0.25 - q * 0.2))))
    return tl.where(q < SERIES, series, _log2(1.0 + q, INTERPRETED) * LN2)


@triton.jit
def _halves(x):
    """Left and right columns of `[BN, W]`. A thread holds some of both, so nothing moves."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _neighbours(x):
    """Even and odd columns, as those are in one thread."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _last_halves(x, BY_ROWS: tl.constexpr):
    """For the third cut of a quarter tile: on Ampere no more columns of a row are in one thread, but rows are."""
    if BY_ROWS:
        return tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), (1, 2, 0)))
    else:
        return _halves(x)


@triton.jit
def _join(pair, SHIFT: tl.constexpr):
    """Of p and q, (1 + p) (1 + q) - 1, exact for small ones; all three times 2^SHIFT."""
    p, q = pair
    return p + q * (1.0 + p * (1.0 / (1 << SHIFT)))


@triton.jit
def _groups(x, GROUP: tl.constexpr, BY_ROWS: tl.constexpr):
    """Sums of those GROUP elements whose losses `_pairs` takes together: within a thread, so no shuffles."""
    a, b = _halves(x)
    a, b = _neighbours(a + b)
    if GROUP == 8:
        a, b = _last_halves(a + b, BY_ROWS)
    return a + b


@triton.jit
def _pairs(
    logits, GROUP: tl.constexpr, BY_ROWS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
    GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Of pairs with logits + SHIFT `[BN, W]`: 2^SHIFT G, the sum of their losses, and sums of 2^SHIFT G over groups.

    The loss of GROUP pairs takes one logarithm: that of the product of 1 + e^logit. Logits are cut off where the
    product would overflow; what is above adds to the loss as it is, and G is 1 to 2^(-124 / GROUP). The sum of the
    losses is needed at once: its barriers keep the compiler from working on several blocks of columns at a time.
    """
    # NaN passes, as in torch: else it would become a large logit, and its gradients finite
    low = tl.minimum(logits, (124.0 - SHIFT) / GROUP + SHIFT, propagate_nan=tl.PropagateNan.ALL)
    e = _exp2(low, INTERPRETED)
    above = _groups(logits - low, GROUP, BY_ROWS)
    G, sums_g = e, above
    if GRADIENTS:
        G = e * _reciprocal(1.0 + e * (1.0 / (1 << SHIFT)), INTERPRETED)
        sums_g = _groups(G, GROUP, BY_ROWS)
    q = _join(_halves(e), SHIFT)
    q = _join(_neighbours(q), SHIFT)
    if GROUP == 8:
        q = _join(_last_halves(q, BY_ROWS), SHIFT)
    return G, tl.sum(_log1p(q * (1.0 / (1 << SHIFT)), INTERPRETED) + above * LN2), sums_g


@triton.jit
def _columns(S, PARTS: tl.constexpr):
    """S cut into PARTS (2 or 4) equal blocks of columns."""
    left, right = _halves(S)
    if PARTS == 2:
        return left, right
    else:
        a, b = _halves(left)
        c, d = _halves(right)
        return a, b, c, d


@triton.jit
def _cosines(
    S, X, Y, first_row, first_column, n, m, width,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """S `[BN, BM]`, fp32, with the cosines added. Rows beyond the end give anything finite."""
    # without it, a loop that may run no turn sets S to 0 twice: half an instruction a logit
    tl.assume(width > 0)
    if not DESCRIPTORS:
        # the last row again instead of a mask; 64 bits for where the tile is, 32 within it
        row = tl.minimum(tl.arange(0, BN), n - 1 - first_row)
        column = tl.minimum(tl.arange(0, BM), m - 1 - first_column)
        depth = tl.arange(0, BD)
        x_at = X + first_row.to(tl.int64) * width + (row[:, None] * width + depth[None, :])
        y_at = Y + first_column.to(tl.int64) * width + (column[:, None] * width + depth[None, :])
    for start in range(0, width, BD):
        if DESCRIPTORS:
            x, y = X.load([first_row, start]), Y.load([first_column, start])
        else:
            x, y = tl.load(x_at), tl.load(y_at)
            x_at += BD
            y_at += BD
        if INTERPRETED:
            x, y = x.to(tl.float32), y.to(tl.float32)
        # the factors have 16 bits: no precision is lost whatever is said here
        S = tl.dot(x, y.T, S, input_precision="ieee")
    return S


@triton.jit
def _cosines_that_count(
    X, Y, SCALE, MARKS, PLACES, DEPTHS, first_row, first_column, n, m, width,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr, ALIKE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, READ: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """S `[BN, BM]`, -2^30 or less where a pair is left out. Arguments as of `sigmoid_tile_kernel`."""
    S = (
        only_alike(SCALE, MARKS, PLACES, DEPTHS, BN, BM, INTERPRETED)
        if ALIKE
        else tl.zeros((BN, BM), dtype=tl.float32)
    )
    S = _cosines(S, X, Y, first_row, first_column, n, m, width, BN, BM, BD, DESCRIPTORS, INTERPRETED)
    if CHECKED and not ALIKE:
        # after the cosines: a sum that began with a loop would be set to 0 twice, half an instruction a logit
        S = leave_out(S, MARKS, PLACES, DEPTHS, READ, INTERPRETED, INVERTED=False)
    return S


@triton.jit
def _store(
    G, g, first_row, first_column, stride_g, weight,
    ALIKE: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # the buffer has room for whole tiles, and pairs that were left out store their 0: no mask
    if DESCRIPTORS:
        if ALIKE:
            g = weight * g + G.load([first_row, first_column])
        G.store([first_row, first_column], _rounded(g, G.dtype, INTERPRETED))
    else:
        row, column = tl.arange(0, g.shape[0]), tl.arange(0, g.shape[1])
        corner = G + first_row.to(tl.int64) * stride_g + first_column
        at = corner + (row[:, None] * stride_g + column[None, :])
        if ALIKE:
            g = weight * g + tl.load(at)
        tl.store(at, _rounded(g, G.dtype.element_ty, INTERPRETED))


@triton.jit
def _rounded(g, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:
        bits = g.to(tl.int32, bitcast=True)
        g = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return g.to(dtype)


@triton.jit(do_not_specialize=["n", "m"])
def sigmoid_tile_kernel(
    X, Y, SCALE, BIAS, G, SUMS, MARKS, PLACES, DEPTHS, n, m, width, stride_g, weight,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BAND: tl.constexpr, PARTS: tl.constexpr,
    CHECKED: tl.constexpr, ALIKE: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    GRADIENTS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of BN images and BM texts a program; all pairs but the matching ones, which are left to `finish_kernel`,
    and those with equal ids.

    X `[n, width]`, Y `[m, width]`: factors (`factors.py`), width a multiple of BD; G with room for whole tiles, row
    stride stride_g: pointers, or descriptors under DESCRIPTORS. SCALE, BIAS: fp32, one element. SUMS `[programs, 2]`:
    of loss and of G. MARKS: `masking.marks`, in the dtype of X. PLACES, DEPTHS: of `place_kernel`. CHECKED: the call
    has pairs to leave out; only tiles with such pairs pay for it. G is stored times 2^SHIFT.
    ALIKE: pairs with equal ids alone, counted weight times, are added to G; programs without any end at once.
    PARTS: columns are finished in so many blocks, one after the other, to need fewer registers.
    INTERPRETED: plain functions; and bf16 by hand, which the interpreter multiplies wrongly and does not round.
    """
    READ: tl.constexpr = not (DESCRIPTORS or INTERPRETED)
    first_row, first_column = tile_of_program(BN, BM, BAND, READ=False)
    if first_column >= m:
        # beyond the last column of the last band
        return
    if ALIKE:  # noqa: SIM102 (one is for the compiler, one for the GPU)
        if not has_alike(DEPTHS, BN):
            return
    S = _cosines_that_count(
        X, Y, SCALE, MARKS, PLACES, DEPTHS, first_row, first_column, n, m, width,
        BN, BM, BD, CHECKED, ALIKE, DESCRIPTORS, READ, INTERPRETED,
    )  # fmt: skip
    WIDTH: tl.constexpr = BM // PARTS
    scale, bias = scale_and_bias(SCALE, BIAS)
    first_row, first_column = tile_of_program(BN, BM, BAND, READ)
    loss, sums_g = 0.0, 0.0
    parts = _columns(S, PARTS)
    for part in tl.static_range(PARTS):
        logits = parts[part] * (scale * LOG2E) + (bias * LOG2E + SHIFT)
        g, part_loss, part_g = _pairs(logits, GROUP, not DESCRIPTORS, SHIFT, INTERPRETED, GRADIENTS)
        loss += part_loss
        if GRADIENTS:
            left = first_column + part * WIDTH
            _store(G, g, first_row, left, stride_g, weight, ALIKE, DESCRIPTORS, INTERPRETED)
            sums_g += part_g
    sums = SUMS + number_of_program(READ) * 2
    if ALIKE:
        loss *= weight
        sums_g *= weight
    tl.store(sums, loss)
    if GRADIENTS:
        tl.store(sums + 1, tl.sum(sums_g) / (1 << SHIFT))


@triton.jit(do_not_specialize=["n", "m", "positives"])
def finish_kernel(
    X, Y, SCALE, BIAS, DX, DY, SUMS, n, m, width, positives,
    BN: tl.constexpr, BD: tl.constexpr, GRADIENTS: tl.constexpr, SHIFT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What is left after the products, for BN rows a program: the matching pairs in fp32, exactly, and the scale.

    DX `[n, width]` holds 2^SHIFT G Y and becomes the gradient of the images; DY `[m, width]` gets 2^SHIFT g x of
    matching pairs added (each of its rows has one writer). SUMS `[programs, 3]`: loss and g of matching pairs, and g S
    of all.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    column = row + positives
    matches = (row < n) & (column >= 0) & (column < m)
    depth = tl.arange(0, BD)
    x_at = row.to(tl.int64)[:, None] * width + depth[None, :]
    y_at = column.to(tl.int64)[:, None] * width + depth[None, :]
    scale, bias = tl.load(SCALE), tl.load(BIAS)
    S = tl.zeros((BN,), dtype=tl.float32)
    for start in range(0, width, BD):
        inside = matches[:, None] & (depth[None, :] < width - start)
        x = tl.load(X + x_at + start, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(Y + y_at + start, mask=inside, other=0.0).to(tl.float32)
        S += tl.sum(x * y, axis=1)
    against = -(S * scale + bias)
    e = tl.exp(-tl.abs(against))
    loss = tl.maximum(against, 0.0) + _log1p(e, INTERPRETED)
    g = tl.where(matches, tl.where(against > 0, -1.0, -e) / (1.0 + e), 0.0)
    sums = SUMS + tl.program_id(0).to(tl.int64) * 3
    tl.store(sums, tl.sum(tl.where(matches, loss, 0.0)))
    if GRADIENTS:
        cosine_sum = g * S
        for start in range(0, width, BD):
            real = (row < n)[:, None] & (depth[None, :] < width - start)
            inside = real & matches[:, None]
            x = tl.load(X + x_at + start, mask=real, other=0.0).to(tl.float32)
            y = tl.load(Y + y_at + start, mask=inside, other=0.0).to(tl.float32)
            negatives = tl.load(DX + x_at + start, mask=real, other=0.0) / (1 << SHIFT)
            cosine_sum += tl.sum(x * negatives, axis=1)
            tl.store(DX + x_at + start, (negatives + g[:, None] * y) * scale, mask=real)
            d_text = tl.load(DY + y_at + start, mask=inside, other=0.0)
            tl.store(DY + y_at + start, d_text + g[:, None] * x * (1 << SHIFT), mask=inside)
        tl.store(sums + 1, tl.sum(g))
        tl.store(sums + 2, tl.sum(cosine_sum))
