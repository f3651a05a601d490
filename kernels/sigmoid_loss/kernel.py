# The compiler gives the types.
# mypy: disable-error-code="no-untyped-def"
"""The two kernels in Triton: one does the n m E work on tiles of pairs, the other finishes rows and matching pairs.

Letters: X images, Y texts, S = X Y' cosines, G = sigmoid(logits), all of one tile. Logits are in units of ln 2, because
the machine's exponential and logarithm have base 2.
"""

import triton
import triton.language as tl

from kernels.sigmoid_loss.left_out import leave_out, places, places_of_ids, scale_and_bias

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# as a logit: its power of two is 0, and so are its loss and its gradient
LEFT_OUT = tl.constexpr(-10000.0)
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
def _weighted_pairs(
    logits, row_ids_at, column_ids_at, has_alike, weight, GROUP: tl.constexpr, BY_ROWS: tl.constexpr,
    SHIFT: tl.constexpr, INTERPRETED: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """`_pairs` without those that are alike, then these in a second round, counted weight times."""
    G = tl.zeros(logits.shape, dtype=tl.float32)
    sums_g = _groups(G, GROUP, BY_ROWS)
    loss, factor = 0.0, 1.0
    for turn in range(1 + has_alike.to(tl.int32)):
        shown = logits
        if has_alike:
            alike = tl.load(row_ids_at)[:, None] == tl.load(column_ids_at)[None, :]
            shown = tl.where(alike ^ (turn == 0), logits, LEFT_OUT)
        g, turn_loss, turn_g = _pairs(shown, GROUP, BY_ROWS, SHIFT, INTERPRETED, GRADIENTS)
        G += factor * g
        loss += factor * turn_loss
        sums_g += factor * turn_g
        factor = weight
    return G, loss, sums_g


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
def _tile_of_program(BN: tl.constexpr, BM: tl.constexpr, BAND: tl.constexpr):
    """First row and column. Programs that run together share a band of BAND tile columns, which stay in the cache, as
    all rows of a chunk do. One band for each second index of the grid: dividing by its size would take 60 instructions.
    """
    place = tl.program_id(0)
    return place // BAND * BN, (tl.program_id(1) * BAND + place % BAND) * BM


@triton.jit
def _cosines(
    X, Y, first_row, first_column, n, m, width,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """S `[BN, BM]` in fp32. Rows beyond the end give anything finite."""
    # without it, a loop that may run no turn sets S to 0 twice: half an instruction a logit
    tl.assume(width > 0)
    S = tl.zeros((BN, BM), dtype=tl.float32)
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
def _store(
    G, g, first_row, first_column, stride_g, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    dtype: tl.constexpr = G.dtype if DESCRIPTORS else G.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        bits = g.to(tl.int32, bitcast=True)
        g = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    # the buffer has room for whole tiles, and pairs that were left out store their 0: no mask
    if DESCRIPTORS:
        G.store([first_row, first_column], g.to(dtype))
    else:
        row, column = tl.arange(0, g.shape[0]), tl.arange(0, g.shape[1])
        corner = G + first_row.to(tl.int64) * stride_g + first_column
        tl.store(corner + (row[:, None] * stride_g + column[None, :]), g.to(dtype))


@triton.jit(do_not_specialize=["n", "m", "positives"])
def sigmoid_tile_kernel(
    X, Y, SCALE, BIAS, G, SUMS, MARKS, X_IDS, SORTED, Y_IDS, n, m, width, stride_g, positives, weight,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BAND: tl.constexpr, PARTS: tl.constexpr,
    CHECKED: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    GRADIENTS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr, HAS_IDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One tile of BN images and BM texts a program; all pairs but the matching ones, which are left to `finish_kernel`.

    X `[n, width]`, Y `[m, width]`: factors (`factors.py`), width a multiple of BD; G with room for whole tiles, row
    stride stride_g: pointers, or descriptors under DESCRIPTORS. SCALE, BIAS: fp32, one element. SUMS `[programs, 2]`:
    of loss and of G. positives: row i matches column i + positives; m or more for none. MARKS: `left_out.marks`, in the
    dtype of X. CHECKED: the call has matching pairs or tiles that stick out; only such tiles pay for it. G is stored
    times 2^SHIFT.
    PARTS: columns are finished in so many blocks, one after the other, to need fewer registers.
    HAS_IDS: X_IDS, Y_IDS are int32 for whole tiles, SORTED the former in order within each tile. Pairs with equal ids
    are left out; under WEIGHTED they count weight times. Else these four are not used.
    INTERPRETED: plain functions; and bf16 by hand, which the interpreter multiplies wrongly and does not round.
    """
    first_row, first_column = _tile_of_program(BN, BM, BAND)
    if first_column >= m:
        # beyond the last column of the last band
        return
    S = _cosines(X, Y, first_row, first_column, n, m, width, BN, BM, BD, DESCRIPTORS, INTERPRETED)
    if CHECKED:
        row_place, column_place, is_special = places(first_row, first_column, n, m, positives, BN, BM)
        S = leave_out(S, SCALE, MARKS, row_place, column_place, is_special, BN, INTERPRETED)
    WIDTH: tl.constexpr = BM // PARTS
    row, column = tl.arange(0, BN), tl.arange(0, WIDTH)
    if HAS_IDS:
        sorted_ids, column_ids = SORTED + first_row, tl.load(Y_IDS + first_column + tl.arange(0, BM))
        column_place = places_of_ids(sorted_ids, column_ids, BN)
        has_alike = tl.min(column_place) < BN
        if not WEIGHTED:
            row_place = places_of_ids(sorted_ids, tl.load(X_IDS + first_row + row), BN)
            S = leave_out(S, SCALE, MARKS, row_place, column_place, has_alike, BN, INTERPRETED)
    scale, bias = scale_and_bias(SCALE, BIAS)
    loss, sums_g = 0.0, 0.0
    parts = _columns(S, PARTS)
    for part in tl.static_range(PARTS):
        left = first_column + part * WIDTH
        logits = parts[part] * (scale * LOG2E) + (bias * LOG2E + SHIFT)
        if WEIGHTED:
            g, part_loss, part_g = _weighted_pairs(
                logits, X_IDS + first_row + row, Y_IDS + left + column, has_alike, weight,
                GROUP, not DESCRIPTORS, SHIFT, INTERPRETED, GRADIENTS,
            )  # fmt: skip
        else:
            g, part_loss, part_g = _pairs(logits, GROUP, not DESCRIPTORS, SHIFT, INTERPRETED, GRADIENTS)
        loss += part_loss
        if GRADIENTS:
            _store(G, g, first_row, left, stride_g, DESCRIPTORS, INTERPRETED)
            sums_g += part_g
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    sums = SUMS + program * 2
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
