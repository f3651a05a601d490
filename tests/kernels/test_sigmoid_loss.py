"""Block and op against the float64 reference: values, gradients, memory, work, refusals."""

import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.nn.functional import normalize

from kernels import sigmoid_loss
from kernels.sigmoid_loss import chunked
from kernels.sigmoid_loss.chunked import sigmoid_loss_block, sigmoid_loss_block_value
from kernels.sigmoid_loss.reference import sigmoid_loss_block_reference, sigmoid_loss_reference
from kernels.testing import ODD_SHAPES, OpRecorder, assert_close, poisoned_memory

NAMES = ("loss", "images", "texts", "scale", "bias")
INIT, TRAINED = (10.0, -10.0), (117.0, -16.5)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield


def make(n, m, width, scale, bias, dtype=torch.float64, seed=0):
    """Correlated unit vectors, so that positives are found and hard negatives exist."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, width, generator=generator, dtype=torch.float64)
    texts = torch.randn(m, width, generator=generator, dtype=torch.float64)
    shared = min(n, m)
    texts[:shared] += images[:shared]
    scalars = (torch.tensor(value, dtype=torch.float64) for value in (scale, bias))
    embeddings = (normalize(part, dim=-1).to(dtype) for part in (images, texts))
    return [*embeddings, *scalars]


def differentiate(function, inputs, **options):
    """Loss and gradients of `function` in float64, by autograd."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check_block(inputs, limits, *, positives, ids=None, chunk_rows=chunked.CHUNK_ROWS):
    expected = differentiate(sigmoid_loss_block_reference, inputs, positives=positives, ids=ids)
    block = sigmoid_loss_block(*inputs, positives=positives, ids=ids, chunk_rows=chunk_rows)
    for name, actual, truth, limit in zip(NAMES, block, expected, limits, strict=True):
        assert_close(actual, truth, limit, name)
    value = sigmoid_loss_block_value(*inputs, positives=positives, ids=ids, chunk_rows=chunk_rows)
    assert_close(value, expected[0], limits[0], "value")


@pytest.mark.parametrize("positives", [None, 0, 2, -3])
@pytest.mark.parametrize(("n", "m"), ODD_SHAPES)
def test_block_equals_the_reference_for_odd_shapes(n, m, positives):
    # measured: at most 6e-16
    width = 1 + (n * m) % 19
    check_block(make(n, m, width, 10.0, -3.0), [1e-14] * 5, positives=positives, chunk_rows=16)


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 100, 101, 102, 1024])
def test_block_does_not_depend_on_the_chunk(chunk_rows):
    check_block(make(101, 67, 24, 30.0, -8.0), [1e-14] * 5, positives=0, chunk_rows=chunk_rows)


@pytest.mark.parametrize("bias", [-20.0, -10.0, -1.0, 0.0])
@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0, 120.0])
def test_fp32_block_over_the_range_of_scale_and_bias(scale, bias):
    # measured, worst of all: loss 6e-7, images 8e-7, texts 8e-7, scale 4e-7, bias 3e-7
    inputs = make(131, 131, 72, scale, bias, torch.float32)
    check_block(inputs, [2e-6, 3e-6, 3e-6, 2e-6, 1e-6], positives=0, chunk_rows=50)


@pytest.mark.parametrize(("scale", "bias"), [INIT, TRAINED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_summed_in_fp32(dtype, scale, bias):
    # the reference gets the same rounded embeddings; measured: loss 4e-8, images 3e-7, texts 3e-7,
    # scale 2e-8, bias 1e-8; in bf16 with AMX 1.2e-3 and, for the scale, 4e-5
    inputs = make(131, 131, 72, scale, bias, dtype)
    is_bf16 = dtype == torch.bfloat16
    limits = [2e-7, 2e-3, 2e-3, 1e-4, 1e-7] if is_bf16 else [2e-7, 1e-6, 1e-6, 1e-7, 1e-7]
    check_block(inputs, limits, positives=0, chunk_rows=50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "bias"), [(200.0, 0.0), (200.0, -20.0), (1000.0, 0.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_identical_and_opposite_embeddings_at_extreme_logits(sign, scale, bias, dtype):
    """Logits of +-200 and beyond: no overflow, no loss of the small terms."""
    images, _, scale, bias = make(33, 33, 16, scale, bias, dtype)
    limit = 1e-14 if dtype == torch.float64 else 1e-6  # measured 2e-16 and 2e-7
    check_block([images, sign * images, scale, bias], [limit] * 5, positives=0, chunk_rows=16)


def test_softplus_is_exact_beside_its_linear_range():
    logits = torch.tensor([[-800.0, -41.0, 19.9, 20.1, 39.9, 40.1, 800.0]], dtype=torch.float64)
    expected = torch.logaddexp(logits, torch.zeros_like(logits))
    assert_close(chunked._softplus(logits, out=torch.empty_like(logits)), expected, 1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_op_gives_value_and_gradients_in_the_types_of_its_inputs(dtype, shape):
    # measured: float64 3e-16, fp32 2e-7, and, for the rounding of the result, 1.6e-3 in bf16 and 2.1e-4 in fp16
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    images, texts, scale, bias = make(37, 37, 24, *TRAINED, dtype)
    inputs = [images, texts, scale.to(torch.float32).reshape(shape), bias.to(torch.float32).reshape(shape)]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = sigmoid_loss(*leaves)
    assert loss.shape == ()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    (loss * -2.5).backward()
    value, *gradients = differentiate(sigmoid_loss_reference, inputs)
    assert_close(loss.detach(), value.reshape(()), 1e-14 if dtype == torch.float64 else 1e-6, "loss")
    for name, leaf, gradient in zip(NAMES[1:], leaves, gradients, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        # scale and bias are fp32 here: measured 3e-8, in bf16 with AMX 4e-5
        of_scalars = 1e-4 if dtype == torch.bfloat16 else 1e-6
        assert_close(leaf.grad, -2.5 * gradient, limit if leaf.ndim == 2 else of_scalars, name)


def test_op_takes_non_contiguous_embeddings():
    images, texts, scale, bias = make(19, 19, 22, *INIT)
    expected = differentiate(sigmoid_loss_reference, [images[:, ::2], texts[:, ::2], scale, bias])
    strided = images.T.contiguous().T[:, ::2]
    assert not strided.is_contiguous()
    leaves = [part.detach().requires_grad_() for part in (strided, texts[:, ::2], scale, bias)]
    gradients = torch.autograd.grad(sigmoid_loss(*leaves), leaves)
    for name, actual, truth in zip(NAMES[1:], gradients, expected[1:], strict=True):
        assert_close(actual, truth, 1e-12, name)


def test_op_passes_gradcheck():
    images, texts, scale, bias = make(5, 5, 3, 4.0, -2.0)
    leaves = [tensor.requires_grad_() for tensor in (images, texts, scale, bias.reshape(1))]
    assert torch.autograd.gradcheck(sigmoid_loss, leaves)


@pytest.mark.parametrize("wanted", range(4))
def test_op_gives_a_gradient_to_each_input_alone(wanted):
    inputs = make(9, 9, 8, *INIT)
    inputs[wanted].requires_grad_()
    sigmoid_loss(*inputs).backward()
    assert_close(inputs[wanted].grad, differentiate(sigmoid_loss_reference, inputs)[1 + wanted], 1e-12)


# limits of the inputs' rounding and of what comes after; measured: fp16 5e-4 and 3e-7, bf16 5e-3 and 2e-7 (no AMX)
ROUNDED = [
    (None, torch.float16, 1e-3, 1e-6),
    (torch.float16, torch.float16, 1e-3, 1e-6),
    (torch.bfloat16, torch.bfloat16, 1e-2, 2e-3),
    (torch.float32, torch.float32, 1e-6, 1e-6),
]


@pytest.mark.parametrize("place", [INIT, TRAINED])
@pytest.mark.parametrize(("wanted", "used", "limit", "own_limit"), ROUNDED)
def test_op_rounds_fp32_embeddings_once_and_gives_fp32_gradients(place, wanted, used, limit, own_limit):
    """Under autocast, as a model's training calls it: None is fp16 there."""
    inputs = make(67, 67, 41, *place, torch.float32)
    exact = differentiate(sigmoid_loss_reference, inputs)
    rounded = [tensor.to(used) if tensor.ndim == 2 else tensor for tensor in inputs]
    own = differentiate(sigmoid_loss_reference, rounded)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16), blocks_by_dtype() as dtypes:
        loss = sigmoid_loss(*leaves, compute_dtype=wanted)
    (loss * -2.5).backward()
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        assert_close(sigmoid_loss(*leaves, compute_dtype=wanted), loss.detach(), 1e-6)
    assert (loss.dtype, set(dtypes)) == (torch.float32, {used})
    found = [loss.detach(), *(leaf.grad / -2.5 for leaf in leaves)]
    for name, actual, truth, given in zip(NAMES, found, own, exact, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, truth, own_limit, name)
        assert_close(actual, given, limit, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_without_autocast_and_of_other_inputs_the_products_have_the_dtype_given(dtype):
    inputs = make(9, 9, 5, *INIT, dtype)
    with blocks_by_dtype() as dtypes, torch.autocast("cpu", enabled=dtype != torch.float32):
        sigmoid_loss(*(tensor.requires_grad_() for tensor in inputs))
    assert dtypes == [dtype]


@contextmanager
def blocks_by_dtype():
    """Yields a list that gets the dtype of the embeddings of every block that is differentiated."""
    dtypes, block = [], chunked.sigmoid_loss_block

    def recorded(images, *args, **options):
        dtypes.append(images.dtype)
        return block(images, *args, **options)

    with mock.patch.object(chunked, "sigmoid_loss_block", recorded):
        yield dtypes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_block_on_a_gpu(dtype):
    inputs = [tensor.cuda() for tensor in make(1300, 1300, 72, *TRAINED, dtype)]
    check_block(inputs, [1e-12 if dtype == torch.float64 else 1e-5] * 5, positives=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", [INIT, TRAINED])
def test_fp32_embeddings_under_the_autocast_of_a_gpu(place):
    inputs = [tensor.cuda() for tensor in make(1300, 1300, 72, *place, torch.float32)]
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = sigmoid_loss(*leaves)
    loss.backward()
    value, *gradients = differentiate(sigmoid_loss_reference, inputs)
    assert_close(loss.detach(), value, 1e-3)
    for name, leaf, gradient in zip(NAMES[1:], leaves, gradients, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert_close(leaf.grad, gradient, 1e-2, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_loss_replays_on_other_embeddings():
    leaves = [tensor.float().cuda().requires_grad_() for tensor in make(512, 512, 64, *INIT, torch.float32)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(sigmoid_loss(*leaves, compute_dtype=torch.float16), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = sigmoid_loss(*leaves, compute_dtype=torch.float16)
        found = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    others = [tensor.float().cuda() for tensor in make(512, 512, 64, *INIT, torch.float32, seed=1)]
    with torch.no_grad():
        for leaf, other in zip(leaves, others, strict=True):
            leaf.copy_(other)
    graph.replay()
    expected = differentiate(sigmoid_loss_reference, others)
    for name, actual, truth in zip(NAMES, found, expected, strict=True):
        assert_close(actual, truth, 1e-2, name)


def test_matching_embeddings_at_scale_ten_cost_what_the_formula_says():
    """Orthogonal pairs: an image pays softplus(-(10 - 10)) for its own text and softplus(-10) for each other."""
    embeddings = torch.eye(8, dtype=torch.float64)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    expected = math.log(2) + 7 * math.log1p(math.exp(-10))
    assert sigmoid_loss(embeddings, embeddings, scale, bias).item() == pytest.approx(expected, rel=1e-14)


def test_no_tensor_of_n_times_m_elements_is_made():
    n, width = 2500, 32
    inputs = [tensor.float().requires_grad_() for tensor in make(n, n, width, *INIT)]
    with OpRecorder() as recorder:
        sigmoid_loss(*inputs).backward()
    chunk = chunked.CHUNK_ROWS * n
    assert recorder.allocated[:2] == [chunk, chunk]
    assert recorder.allocated[2] <= n * width
    assert sum(recorder.allocated) <= 2 * chunk + 12 * n * width


def test_the_recorder_sees_the_reference_hold_every_logit():
    inputs = [tensor.requires_grad_() for tensor in make(300, 300, 16, *INIT)]
    with OpRecorder() as recorder:
        sigmoid_loss_reference(*inputs).backward()
    assert recorder.allocated[0] == 300 * 300


def products(recorder):
    return recorder.calls["mm"] + recorder.calls["addmm"] + recorder.calls["addmm_"]


def test_without_gradients_only_the_logits_are_computed():
    inputs = [tensor.requires_grad_() for tensor in make(40, 40, 16, *INIT)]
    with OpRecorder() as training:
        loss = sigmoid_loss(*inputs)
    with OpRecorder() as evaluation, torch.no_grad():
        value = sigmoid_loss(*inputs)
    with OpRecorder() as constant:
        sigmoid_loss(*(tensor.detach() for tensor in inputs))
    assert (products(training), products(evaluation), products(constant)) == (3, 1, 1)
    assert not value.requires_grad
    assert_close(value, loss.detach(), 1e-14)


def test_backward_twice_and_second_derivative():
    inputs = [tensor.requires_grad_() for tensor in make(6, 6, 4, *INIT)]
    loss = sigmoid_loss(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sigmoid_loss(*inputs), inputs, create_graph=True)


def refused():
    embeddings, scale = torch.ones(4, 3), torch.tensor(1.0)
    yield "two \\[B, E\\]", (embeddings[0], embeddings[0], scale, scale)
    yield "two \\[B, E\\]", (embeddings, embeddings[:3], scale, scale)
    yield "two \\[B, E\\]", (embeddings, embeddings[:, :2], scale, scale)
    yield "at least 1", (embeddings[:0], embeddings[:0], scale, scale)
    yield "one floating-point dtype", (embeddings, embeddings.double(), scale, scale)
    yield "one floating-point dtype", (embeddings.long(), embeddings.long(), scale, scale)
    yield "logit_scale must be one number", (embeddings, embeddings, torch.ones(2), scale)
    yield "logit_bias must be one number", (embeddings, embeddings, scale, torch.tensor(1))
    yield "one device", (embeddings, embeddings, scale.to("meta"), scale)


@pytest.mark.parametrize(("message", "inputs"), refused())
def test_bad_input_is_refused_with_the_reason(message, inputs):
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(*inputs)


@pytest.mark.parametrize("wanted", [torch.float64, torch.int32, "fp16"])
def test_other_dtypes_of_products_are_refused(wanted):
    with pytest.raises(ValueError, match="compute_dtype must be float16, bfloat16, float32 or None; got"):
        sigmoid_loss(*make(4, 4, 3, *INIT), compute_dtype=wanted)


def test_a_setting_of_torch_for_bf16_factors_lasts_as_long_as_the_op():
    before = torch.backends.mkldnn.matmul.fp32_precision
    factors = [torch.randn(64, 64), torch.randn(64, 64)]
    expected = torch.mm(*factors)
    sigmoid_loss(*(tensor.bfloat16() for tensor in make(40, 40, 16, *INIT)))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.equal(torch.mm(*factors), expected)
