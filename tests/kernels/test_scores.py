"""Row and column sums of the pairwise loss against the float64 reference; refusals; memory."""

import pytest
import torch

from kernels import PairIds, sigmoid_loss, sigmoid_loss_scores
from kernels.sigmoid_loss import chunked
from kernels.sigmoid_loss.chunked import sigmoid_loss_block_scores
from kernels.sigmoid_loss.reference import sigmoid_loss_scores_reference
from kernels.testing import ODD_SHAPES, OpRecorder, assert_close, poisoned_memory
from tests.kernels.test_pair_ids import WEIGHTS, make_ids
from tests.kernels.test_sigmoid_loss import INIT, TRAINED, make


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield


def check(inputs, limit, *, positives, ids=None, **options):
    expected = sigmoid_loss_scores_reference(
        *(tensor.double() for tensor in inputs), positives=positives, ids=ids
    )
    scores = sigmoid_loss_block_scores(*inputs, positives=positives, ids=ids, **options)
    for name, actual, truth in zip(scores._fields, scores, expected, strict=True):
        assert_close(actual, truth, limit, name)


@pytest.mark.parametrize("positives", [None, 0, 2, -3])
@pytest.mark.parametrize(("n", "m"), ODD_SHAPES)
def test_scores_equal_the_reference_for_odd_shapes(n, m, positives):
    # measured: at most 4e-16
    check(make(n, m, 1 + (n * m) % 19, 10.0, -3.0), 1e-14, positives=positives, chunk_rows=16)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("chunk_rows", [1, 50, 101, 1024])
def test_scores_with_alike_pairs(chunk_rows, weight):
    ids = make_ids(101, 67, weight)
    check(make(101, 67, 24, *TRAINED), 1e-14, positives=0, ids=ids, chunk_rows=chunk_rows)


@pytest.mark.parametrize(("scale", "bias"), [INIT, TRAINED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_embeddings(dtype, scale, bias):
    # measured, worst of all: 3e-7
    check(make(131, 127, 72, scale, bias, dtype), 1e-6, positives=0, chunk_rows=50)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_are_sums_of_the_loss(dtype):
    inputs = make(40, 40, 16, *TRAINED, dtype)
    ids = make_ids(40, 40, 0.5)
    scores = sigmoid_loss_scores(*(tensor.clone().requires_grad_() for tensor in inputs), ids=ids)
    loss = sigmoid_loss(*inputs, image_ids=ids.images, text_ids=ids.texts, same_id_weight=0.5)
    for part in scores:
        assert part.dtype == torch.promote_types(dtype, torch.float32)
        assert not part.requires_grad
        assert_close(part.sum() / 40, loss, 1e-6)


def test_scores_are_not_cast_down_by_autocast():
    inputs = make(40, 30, 16, *TRAINED, torch.float32)
    expected = sigmoid_loss_scores_reference(*(tensor.double() for tensor in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = sigmoid_loss_scores(*inputs)
    assert_close(scores.images, expected[0], 1e-6)  # measured 8e-8; bf16 logits give 1e-2


def test_no_tensor_of_n_times_m_elements_is_made():
    n, m, width = 5 * chunked.CHUNK_ROWS // 2, 3000, 32
    images, texts, scale, bias = (tensor.float() for tensor in make(n, m, width, *INIT))
    with OpRecorder() as recorder:
        sigmoid_loss_scores(images, texts, scale, bias)
    assert recorder.allocated[0] == chunked.CHUNK_ROWS * m
    assert recorder.allocated[1] <= chunked.CHUNK_ROWS * width
    assert recorder.calls["mm"] == 3


def refused():
    embeddings, scale, ids = torch.ones(4, 3), torch.tensor(1.0), torch.arange(4)
    inputs = (embeddings, embeddings, scale, scale)
    yield "must be \\[n, E\\] and \\[m, E\\]", (embeddings[0], *inputs[1:]), None
    yield "n and m at least 1", (embeddings[:0], *inputs[1:]), None
    yield "n and m at least 1", (embeddings, embeddings[:0], scale, scale), None
    yield "must be \\[n, E\\] and \\[m, E\\]", (embeddings, embeddings[:, :2], scale, scale), None
    yield "scores: embeddings must have one floating", (embeddings, embeddings.double(), scale, scale), None
    yield "scores: logit_scale must be one number", (embeddings, embeddings, torch.ones(2), scale), None
    yield "scores: all inputs must be on one device", (embeddings, embeddings, scale.to("meta"), scale), None
    yield "image_ids must be 4 integers", inputs, PairIds(ids[:3], ids, 0.0)
    yield "same_id_weight must be a finite", inputs, PairIds(ids, ids, -1.0)


@pytest.mark.parametrize(("message", "inputs", "ids"), refused())
def test_bad_input_is_refused_with_the_reason(message, inputs, ids):
    with pytest.raises(ValueError, match=message):
        sigmoid_loss_scores(*inputs, ids=ids)
