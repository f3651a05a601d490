"""The Triton kernels against float64: compiled where there is a GPU, else in Triton's interpreter, on small tiles.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, for the whole process. So these tests have a
process of their own, which `test_triton_block.py` starts; pytest does not collect this file by its name.
"""

from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels import sigmoid_loss
from kernels.dispatch import force
from kernels.sigmoid_loss.pairs import PairIds
from kernels.sigmoid_loss.reference import (
    sigmoid_loss_block_reference,
    sigmoid_loss_reference,
    sigmoid_loss_scores_reference,
)
from kernels.sigmoid_loss.triton import autotune
from kernels.sigmoid_loss.triton import block as triton_block
from kernels.sigmoid_loss.triton.kernel import _cosines
from kernels.sigmoid_loss.triton.masking import marks
from kernels.sigmoid_loss.triton.tiles import INTERPRETED
from kernels.testing import ODD_SHAPES, OpRecorder, assert_close, poisoned_memory
from tests.kernels.test_pair_ids import WEIGHTS, make_ids
from tests.kernels.test_sigmoid_loss import INIT, NAMES, TRAINED, differentiate, make
from tests.tiers import one_in

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_choose = triton_block._choose
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# loss, images, texts, scale, bias; scale goes through G in the embeddings' dtype. The worst of all, measured in the
# interpreter in groups as GPUs have them, of four pairs in fp32 and of eight in 16 bits, where G ends at 1 - 2e-5:
# fp32 6e-7; bf16 2e-6, 2.1e-3, 1.8e-3, 3.4e-3, 2.2e-5; fp16 2e-6, 2.6e-4, 2.4e-4, 7e-4, 5.3e-5; of scale in blocks
# of two and six pairs, where no errors average
LIMITS = {
    torch.float32: [1.5e-6] * 5,
    torch.bfloat16: [4e-6, 3e-3, 3e-3, 5e-3, 1e-4],
    torch.float16: [4e-6, 4e-4, 4e-4, 1e-3, 1e-4],
}
# the GPU's logarithm is good to 2^-22 absolutely: not measured, from its specification
LEAST = 1e-5 if DEVICE == "cuda" else 0.0
WITH_DESCRIPTORS = INTERPRETED._replace(descriptors=True)
# 66 shapes; the widths are odd and even, below and above the depth of a tile
SHAPES = [(n, m, width) for n, m in ODD_SHAPES for width in (1 + n * m % 37, 41 + (n + m) % 23, 97)]

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield


def check(inputs, *, positives, ids=None, limits=None, **options):
    inputs = [tensor.to(DEVICE) for tensor in inputs]
    if ids is not None:
        options["ids"] = ids = PairIds(ids.images.to(DEVICE), ids.texts.to(DEVICE), ids.weight)
    limits = limits or LIMITS[inputs[0].dtype]
    expected = differentiate(sigmoid_loss_block_reference, inputs, positives=positives, ids=ids)
    block = triton_block.sigmoid_loss_block(*inputs, positives=positives, **options)
    for name, actual, truth, limit in zip(NAMES, block, expected, limits, strict=True):
        assert_close(actual, truth, max(limit, LEAST), name)
    value = triton_block.sigmoid_loss_block_value(*inputs, positives=positives, **options)
    assert_close(value, expected[0], max(limits[0], LEAST), "value")


@pytest.mark.parametrize(("shape", "dtype"), one_in(23, SHAPES, DTYPES))
def test_block_equals_the_reference_for_odd_shapes(shape, dtype):
    n, m, width = shape
    positives = [0, None, 2, -3][(n + m + width + DTYPES.index(dtype)) % 4]
    check(make(n, m, width, 10.0, -3.0, dtype), positives=positives, chunk_rows=48)


@pytest.mark.parametrize(
    ("dtype", "scale", "bias"), one_in(4, DTYPES, [1.0, 10.0, 120.0], [-20.0, -10.0, 0.0])
)
def test_block_over_the_range_of_scale_and_bias(scale, bias, dtype):
    check(make(67, 67, 72, scale, bias, dtype), positives=0)


@pytest.mark.parametrize(("dtype", "parts", "group"), one_in(5, DTYPES, [2, 4], [4, 8]))
def test_every_way_through_the_tile(dtype, parts, group):
    """Blocks of columns, pairs of a logarithm and descriptors, as the tiles for GPUs have them."""
    tile = WITH_DESCRIPTORS._replace(texts=16 * parts, parts=parts, group=group)
    # in eights, G ends at 1 - 2e-5; measured: bias 8e-6, the rest in fp32 1.2e-5
    limits = [max(limit, 3e-5 if group == 8 else 0.0) for limit in LIMITS[dtype]]
    check(make(70, 50, 40, *TRAINED, dtype), positives=1, chunk_rows=64, tile=tile, limits=limits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_without_edges_and_matches(dtype):
    check(make(64, 96, 32, 20.0, -2.0, dtype), positives=None, tile=WITH_DESCRIPTORS)


@pytest.mark.parametrize("positives", one_in(4, [-200, -69, -1, 0, 31, 32, 33, 96, 99, 100, 5000]))
def test_matches_anywhere(positives):
    check(make(70, 100, 24, *TRAINED, torch.float32), positives=positives, chunk_rows=32)


# tiles of 32 texts in bands of eight: two whole ones, the last of one column, of seven and an edge
@pytest.mark.parametrize("m", one_in(3, [475, 512, 544]))
def test_several_bands_of_columns(m):
    inputs = make(40, m, 24, *TRAINED, torch.float32)
    check(inputs, positives=m - 20)
    check_scores(inputs, positives=m - 20)


@pytest.mark.parametrize(
    ("place", "sign", "dtype"),
    one_in(5, [(200.0, 0.0), (200.0, -20.0), (1000.0, 0.0)], [1.0, -1.0], DTYPES),
)
def test_identical_and_opposite_embeddings_at_extreme_logits(place, sign, dtype):
    scale, bias = place
    images, _, scale, bias = make(33, 33, 16, scale, bias, dtype)
    check([images, sign * images, scale, bias], positives=0)


@pytest.mark.parametrize(("dtype", "scale"), one_in(8, DTYPES, [0.0, -1e-9, 1e-6, -120.0, 1e5]))
def test_what_is_masked_stays_out_at_any_scale(dtype, scale):
    """Matching and alike pairs and padding, which a product marks before the scale and its sign come to it."""
    inputs = make(67, 41, 24, scale, -2.0, dtype)
    # measured 1.2e-5, of the scale: at 0 the kernel's is 1e-6, and terms of both signs are all there is
    limits = [max(limit, 3e-5) for limit in LIMITS[dtype]]
    for ids in (None, make_ids(67, 41, 0.0)):
        check(inputs, positives=1, ids=ids, chunk_rows=48, limits=limits)
        check_scores(inputs, positives=1, ids=ids, chunk_rows=48)


@pytest.mark.parametrize("scale", one_in(4, [-3.0, -1e-5, 1e-9, 1e5]))
def test_alike_pairs_alone_have_a_weight_at_any_scale(scale):
    """The second round starts with all others left out."""
    inputs, ids = make(41, 67, 24, scale, -2.0, torch.bfloat16), make_ids(41, 67, 0.7)
    limits = [max(limit, 3e-5) for limit in LIMITS[torch.bfloat16]]
    check(inputs, positives=1, ids=ids, chunk_rows=48, limits=limits)
    check_scores(inputs, positives=1, ids=ids, chunk_rows=48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_marks_meet_where_places_are_equal_or_padding(dtype):
    rows = 32
    images, texts, for_negative = marks(rows, dtype, torch.device("cpu")).double()
    padding_text, padding_image, like_nothing = range(rows, rows + 3)
    images_of = [*range(rows), padding_image]
    texts_of = [*range(rows), padding_text, like_nothing]
    sums = images[images_of] @ texts[texts_of].T
    for row, image in enumerate(images_of):
        for column, text in enumerate(texts_of):
            is_out = image in (text, padding_image) or text == padding_text
            assert (sums[row, column] <= -(2.0**30)) if is_out else (sums[row, column] == 0)
    assert torch.equal(images[images_of] @ for_negative[texts_of].T, -sums)


def test_a_row_of_nan_is_not_hidden():
    images, texts, scale, bias = make(33, 40, 16, *INIT, torch.float32)
    images[5, 3] = float("nan")
    block = triton_block.sigmoid_loss_block(
        *(tensor.to(DEVICE) for tensor in (images, texts, scale, bias)), positives=None, tile=INTERPRETED
    )
    assert all(part.isnan().any() for part in block)
    assert block.images[5].isnan().all()
    assert block.texts.isnan().all()
    assert not block.images[:5].isnan().any()


def test_places_in_a_buffer_of_more_than_2_to_the_31_elements():
    images, texts, scale, bias = (tensor.to(DEVICE) for tensor in make(64, 40, 32, *INIT, torch.bfloat16))
    block = triton_block._Block(images, texts, scale, bias, 0, None, INTERPRETED)
    usual = block.buffer(64)
    # 8 GiB of addresses, of which numpy, unlike torch, touches no page before it is written to
    stride = 2**26
    pages = torch.from_numpy(np.zeros(64 * stride, dtype=np.int16)).to(DEVICE)
    wide = pages.view(torch.bfloat16).as_strided(usual.shape, (stride, 1))
    sums = [block.tiles(images, 0, buffer) for buffer in (usual, wide)]
    assert torch.equal(wide[:, :40], usual[:, :40])
    assert torch.equal(*sums)


@triton.jit
def cosines_of_a_tile(X, Y, S, first, rows, width, SIDE: tl.constexpr, INTERPRETED: tl.constexpr):
    zeros = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    cosines = _cosines(zeros, X, Y, first, first, rows, rows, width, SIDE, SIDE, SIDE, False, INTERPRETED)
    place = tl.arange(0, SIDE)
    tl.store(S + place[:, None] * SIDE + place[None, :], cosines)


def test_places_in_embeddings_of_more_than_2_to_the_31_elements():
    width, rows = 32, 2**26 + 40
    values = torch.randn(2, 32, width, device=DEVICE).half()
    # as above, 4 GiB of addresses a side and a page or two of memory
    far = [
        torch.from_numpy(np.zeros(rows * width, dtype=np.float16)).to(DEVICE).view(rows, width) for _ in "xy"
    ]
    for side, value in zip(far, values, strict=True):
        side[rows - 32 :] = value
    S = torch.empty(32, 32, device=DEVICE)
    cosines_of_a_tile[(1,)](*far, S, rows - 32, rows, width, SIDE=32, INTERPRETED=DEVICE == "cpu")
    assert_close(S, values[0].double() @ values[1].double().T, 1e-6)


def test_tiles_are_summed_in_float64(monkeypatch):
    inputs = [tensor.to(DEVICE) for tensor in make(64, 64, 32, *INIT, torch.float32)]
    block = triton_block._Block(*inputs, 0, None, INTERPRETED)
    grid = block._grid(64, 64)

    class Fills:
        def __getitem__(self, programs):
            return self.fill

        def fill(self, *arguments, **options):
            sums = arguments[5]
            sums.copy_(torch.tensor([2.0**24] + [1.0] * (len(sums) - 1))[:, None])

    monkeypatch.setattr(triton_block, "sigmoid_tile_kernel", Fills())
    sums = block.tiles(block.images, 0, None)
    # an even number of ones would be left of an odd one in fp32
    assert sums.tolist() == [2.0**24 + grid[0] * grid[1] - 1] * 2
    assert (grid[0] * grid[1]) % 2 == 0


def test_matching_pairs_that_cost_nothing_leave_their_small_loss():
    """Orthogonal pairs, matches at +30: all losses are 1e-13, which adding and subtracting 30 would drown."""
    embeddings = torch.eye(40)
    # measured 1.1e-6, from the rounding of the logit
    check([embeddings, embeddings, torch.tensor(60.0), torch.tensor(-30.0)], positives=0, limits=[5e-6] * 5)


def test_a_block_without_images():
    _, texts, scale, bias = make(1, 40, 24, *INIT, torch.float32)
    block = triton_block.sigmoid_loss_block(
        *(tensor.to(DEVICE) for tensor in (texts[:0], texts, scale, bias)), positives=0
    )
    assert block.images.shape == (0, 24)
    assert all(part.count_nonzero() == 0 for part in block)


@pytest.mark.parametrize(
    ("dtype", "shape", "weight"), one_in(11, DTYPES, [(67, 40, 0), (33, 31, 2), (1, 40, None)], WEIGHTS)
)
def test_alike_pairs(dtype, shape, weight):
    n, m, positives = shape
    inputs = make(n, m, 1 + n % 37, *TRAINED, dtype)
    check(inputs, positives=positives, ids=make_ids(n, m, weight), chunk_rows=48)


@pytest.mark.parametrize(("place", "weight"), one_in(5, [(0, 37), (69, 99), (20, 20), (64, 96)], [0.0, 0.5]))
def test_one_alike_pair_anywhere(place, weight):
    """Among tiles that have none: at corners, across tiles, and where it matches as well."""
    n, m = 70, 100
    images, texts = torch.arange(n) * 2, torch.arange(m) * 2 + 1
    images[place[0]] = texts[place[1]] = 10**10
    # so near that leaving it out shows in every output
    inputs = make(n, m, 24, *TRAINED, torch.float32)
    inputs[1][place[1]] = inputs[0][place[0]]
    check(inputs, positives=0, ids=PairIds(images, texts, weight), chunk_rows=48)


@pytest.mark.parametrize(("parts", "weight"), one_in(3, [2, 4], [0.0, 2.5]))
def test_alike_pairs_by_descriptors_and_in_eights(parts, weight):
    tile = WITH_DESCRIPTORS._replace(texts=16 * parts, parts=parts, group=8)
    # measured 3e-6
    ids, limits = make_ids(64, 96, weight), [1e-5] * 5
    check(make(64, 96, 32, 20.0, -2.0, torch.float32), positives=None, ids=ids, tile=tile, limits=limits)


def test_one_text_shared_by_all_leaves_the_matching_pairs():
    same = torch.zeros(40, dtype=torch.int64)
    check(make(40, 40, 24, *TRAINED, torch.float32), positives=0, ids=PairIds(same, same, 0.0))


def check_scores(inputs, *, positives, ids=None, **options):
    inputs = [tensor.to(DEVICE) for tensor in inputs]
    if ids is not None:
        options["ids"] = ids = PairIds(ids.images.to(DEVICE), ids.texts.to(DEVICE), ids.weight)
    expected = sigmoid_loss_scores_reference(
        *(tensor.double() for tensor in inputs), positives=positives, ids=ids
    )
    scores = triton_block.sigmoid_loss_block_scores(*inputs, positives=positives, **options)
    for name, actual, truth in zip(scores._fields, scores, expected, strict=True):
        # measured in the interpreter, worst of all: 5e-7
        assert_close(actual, truth, max(1.5e-6, LEAST), name)


@pytest.mark.parametrize("shape", one_in(8, ODD_SHAPES))
def test_scores_equal_the_reference_for_odd_shapes(shape):
    n, m = shape
    dtype, positives = DTYPES[(n + 2 * m) % 3], [0, None, 2, -3][(n + m) % 4]
    check_scores(make(n, m, 1 + (n * m) % 37, 10.0, -3.0, dtype), positives=positives, chunk_rows=48)


@pytest.mark.parametrize(
    ("tile", "weight"), one_in(5, [INTERPRETED, WITH_DESCRIPTORS._replace(texts=64, parts=4)], WEIGHTS)
)
def test_scores_with_alike_pairs(tile, weight):
    # 64 wide: rows that a descriptor takes begin at multiples of 16 bytes
    inputs, ids = make(67, 101, 64, *INIT, torch.float32), make_ids(67, 101, weight)
    check_scores(inputs, positives=0, ids=ids, chunk_rows=48, tile=tile)


@pytest.mark.parametrize("dtype", DTYPES)
def test_op_runs_on_it_and_rounds_once(dtype):
    images, texts, scale, bias = (tensor.to(DEVICE) for tensor in make(37, 37, 48, *TRAINED, dtype))
    strided = images.T.contiguous().T
    leaves = [tensor.detach().requires_grad_() for tensor in (strided, texts, scale.float(), bias.float())]
    with force("triton"):
        loss = sigmoid_loss(*leaves)
        (loss * -2.5).backward()
        with torch.no_grad():
            evaluated = sigmoid_loss(*leaves)
    value, *gradients = differentiate(sigmoid_loss_reference, [images, texts, scale, bias])
    assert_close(loss.detach(), value, LIMITS[dtype][0] + LEAST)
    assert_close(evaluated, value, LIMITS[dtype][0] + LEAST)
    for name, leaf, gradient, limit in zip(NAMES[1:], leaves, gradients, LIMITS[dtype][1:], strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, -2.5 * gradient, limit * 1.5, name)


@pytest.mark.parametrize("shape", [(37, 48), (13, 5), (67, 41)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fp32_embeddings_are_rounded_once_for_the_16_bit_kernel(dtype, shape):
    inputs = [tensor.to(DEVICE) for tensor in make(shape[0], *shape, *TRAINED, torch.float32)]
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    kinds = []
    with (
        force("triton"),
        mock.patch.object(
            triton_block,
            "_choose",
            lambda images, *rest: kinds.append(images.dtype) or _choose(images, *rest),
        ),
    ):
        sigmoid_loss(*leaves, compute_dtype=dtype).backward()
    assert kinds == [dtype]
    rounded = [tensor.to(dtype) if tensor.ndim == 2 else tensor for tensor in inputs]
    for truth in (rounded, inputs):
        _, *gradients = differentiate(sigmoid_loss_reference, truth)
        limits = LIMITS[dtype][1:] if truth is rounded else [1e-2] * 4
        for name, leaf, gradient, limit in zip(NAMES[1:], leaves, gradients, limits, strict=True):
            assert leaf.grad.dtype == torch.float32
            assert_close(leaf.grad, gradient, max(limit, LEAST), name)


def test_not_a_number_shows_in_the_loss():
    images, texts, scale, bias = (tensor.to(DEVICE) for tensor in make(40, 40, 16, *INIT, torch.float32))
    images[33, 5] = float("nan")
    assert triton_block.sigmoid_loss_block(images, texts, scale, bias, positives=None).loss.isnan()


@pytest.mark.parametrize("dtype", one_in(3, DTYPES))
def test_memory_is_a_chunk_and_a_few_copies_of_the_embeddings(dtype):
    n, width, rows = 192, 32, 96
    inputs = [tensor.to(DEVICE) for tensor in make(n, n, width, *INIT, dtype)]
    with OpRecorder() as recorder:
        triton_block.sigmoid_loss_block(*inputs, positives=0, chunk_rows=rows)
    # of fp32 the factors too: of all texts, and of both chunks of images, one after the other
    factors = [6 * n * width, *[6 * rows * width] * 2] if dtype == torch.float32 else []
    largest = sorted([*factors, rows * n], reverse=True)
    assert recorder.allocated[: len(largest)] == largest
    # under the interpreter library products make fp32 copies of what has 16 bits
    assert recorder.allocated[len(largest)] <= (n * width if dtype == torch.float32 else rows * n)


@pytest.mark.slow
def test_memory_of_scores_is_the_sums_and_places_of_tiles():
    n, rows = 320, 64
    inputs = [tensor.to(DEVICE) for tensor in make(n, n, 1, *INIT, torch.bfloat16)]
    ids = PairIds(torch.arange(n, device=DEVICE), torch.arange(n, device=DEVICE) // 2, 0.5)
    with OpRecorder() as recorder:
        triton_block.sigmoid_loss_block_scores(
            *inputs, positives=0, ids=ids, chunk_rows=rows, tile=INTERPRETED
        )
    # beside the factors of texts and of a chunk of images, which are a block of 32 wide
    tiles = 16 * triton.cdiv(n // 32, 8)
    assert sorted(set(recorder.allocated))[-3:] == [rows * 32, tiles * 2 * 64, n * 32]


@pytest.mark.parametrize(
    "tile",
    one_in(
        7,
        [
            tile
            for table in (autotune.BESIDE, autotune.BESIDE_ON_BLACKWELL)
            for tiles in table.values()
            for tile in tiles
        ],
    ),
)
def test_what_tuning_may_choose_computes_the_same(tile):
    dtype = torch.float32 if tile.group == 4 else torch.bfloat16
    limits = [max(limit, 3e-5 if tile.group == 8 else 0.0) for limit in LIMITS[dtype]]
    check(make(150, 140, 72, *TRAINED, dtype), positives=1, tile=tile, limits=limits)


@pytest.mark.skipif(DEVICE == "cuda", reason="test_autotune.py tunes on a GPU")
def test_a_search_runs_the_block_with_every_candidate(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "imagined")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    ran, real = [], triton_block.sigmoid_loss_block

    def recorded(images, texts, *args, tile, chunk_rows, **options):
        ran.append((len(images), tile, chunk_rows))
        return real(images, texts, *args, tile=tile, chunk_rows=chunk_rows, **options)

    monkeypatch.setattr(triton_block, "sigmoid_loss_block", recorded)
    images, texts, _, _ = make(40, 30, 16, *INIT, torch.bfloat16)
    tuning = triton_block.tuning_of(images, texts)
    assert tuning.case == autotune.Case("imagined", triton.__version__, "bfloat16", 16, 1024, 1024)
    assert tuning.search(lambda run: (run(), len(ran))[1]) == autotune.Choice(tuning.default.tile, 128)
    # for the time and for the results; chunks of at least 128 rows, at most 6 E: one, for this width
    assert ran == [(40, tile, 128) for tile in tuning.tiles() for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("width", [768, 1152, 1000, 515])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_blocks_on_a_gpu(dtype, width):
    check(make(9001, 5003, width, *TRAINED, dtype), positives=7)
