"""The Triton kernel of linear cross-entropy against float64, in the process that `test_triton_softmax.py` starts."""

from functools import partial

import pytest
import torch

from kernels import linear_cross_entropy
from kernels.dispatch import force
from kernels.linear_cross_entropy import chunks, softmax, triton_softmax
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from kernels.testing import OpRecorder, assert_close, poisoned_memory
from tests.kernels.test_linear_cross_entropy import NAMES, SHAPES, check_chunks, differentiate, make
from tests.tiers import one_in

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# loss, hidden, weight, bias; gradients go through G in the dtype of hidden. The worst of all, measured in the
# interpreter: loss 2e-7, gradients in fp32 3e-7, in bf16 3.3e-3 (a single token), in fp16 2.6e-4
LIMITS = {
    torch.float32: [1e-6, 2e-6, 2e-6, 2e-6],
    torch.bfloat16: [1e-6, 4e-3, 4e-3, 4e-3],
    torch.float16: [1e-6, 5e-4, 5e-4, 5e-4],
}


@pytest.fixture(autouse=True)
def _triton():
    with poisoned_memory(), force("triton"):
        yield


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # so that rows have several blocks, and a last one that is not full
    monkeypatch.setattr(
        triton_softmax, "losses_and_slopes", partial(triton_softmax.losses_and_slopes, block=64)
    )


def check(inputs, targets, **options):
    inputs = [tensor.to(DEVICE) for tensor in inputs]
    check_chunks(inputs, targets.to(DEVICE), LIMITS[inputs[0].dtype], **options)


@pytest.mark.parametrize("case", one_in(4, enumerate(SHAPES)))
def test_chunks_equal_the_reference_for_odd_shapes(case):
    turn, shape = case
    check(*make(*shape, DTYPES[turn % 3]), rows=48)


@pytest.mark.parametrize(("dtype", "scale"), one_in(4, DTYPES, [1e-4, 1.0, 1e4]))
def test_factors_of_any_size_keep_their_digits(dtype, scale):
    """1 / T of a mean, say: as a factor of fp16 probabilities it would leave nothing."""
    inputs, targets = make(40, 16, 200, dtype, scale=0.1)
    factors = torch.linspace(-0.5, 1.0, 40, dtype=torch.float64, device=DEVICE) * scale
    check(inputs, targets, factors=factors)


def test_a_token_that_fits_keeps_the_digits_of_its_small_loss():
    fit = torch.linspace(2.0, 60.0, 12)
    logits = torch.zeros(12, 150, device=DEVICE)
    logits[:, 70] = fit
    slopes, ones = torch.empty_like(logits), torch.ones(12, device=DEVICE)
    losses = triton_softmax.losses_and_slopes(logits, torch.full((12,), 70, device=DEVICE), ones, slopes)
    odds = 149 * (-fit.double()).exp()
    assert ((losses.cpu() / odds.log1p() - 1).abs() < 1e-5).all()
    assert ((slopes[:, 70].cpu() / (-odds / (1 + odds)) - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("bias", [0.0, 1e4, -1e4])
def test_logits_far_from_zero(bias):
    inputs, targets = make(20, 16, 150, torch.float32)
    inputs = [torch.round(tensor * 4) / 4 for tensor in inputs]
    check([*inputs[:2], inputs[2] + bias], targets)


def test_the_kernel_equals_torch_in_place_and_beside():
    logits = torch.randn(7, 200, device=DEVICE)[:, :131] * 5
    logits[2, 40], logits[3, :] = float("-inf"), -1e30
    targets, factors = torch.arange(7, device=DEVICE) * 13, torch.linspace(-1, 2, 7, device=DEVICE)
    found = []
    for step in (softmax.losses_and_slopes, triton_softmax.losses_and_slopes):
        for in_place in (True, False):
            rows = logits.clone()
            slopes = rows if in_place else torch.empty_like(rows)
            found += [(step(rows, targets, factors, slopes), slopes), (step(logits.clone(), targets), slopes)]
    for losses, slopes in found[1:]:
        assert_close(losses, found[0][0], 1e-6)
        assert_close(slopes, found[0][1], 1e-6)


@pytest.mark.parametrize(("dtype", "reduction"), one_in(5, DTYPES, ["mean", "none"]))
def test_op_runs_on_it_and_keeps_fp32_parameters(dtype, reduction):
    inputs, targets = make(37, 24, 101, dtype)
    # the parameters in fp32, as they are beside bf16 activations
    leaves = [inputs[0].to(DEVICE), *(tensor.float().to(DEVICE) for tensor in inputs[1:])]
    leaves = [tensor.requires_grad_() for tensor in leaves]
    targets = targets.to(DEVICE)
    targets[::4] = -100
    loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction=reduction)
    (loss * -2.5).sum().backward()
    value, *gradients = differentiate(
        partial(lambda *args, **options: linear_cross_entropy_reference(*args, **options).sum()),
        leaves, targets, reduction=reduction,
    )  # fmt: skip
    assert_close(loss.detach().sum(), value, LIMITS[dtype][0])
    for name, leaf, gradient, limit in zip(NAMES[1:], leaves, gradients, LIMITS[dtype][1:], strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, -2.5 * gradient, limit * 1.5, name)


def test_memory_is_two_chunks_beside_the_gradients(monkeypatch):
    tokens, width, vocabulary = 300, 8, 130
    monkeypatch.setitem(chunks.BUFFER_MIB, "triton", 0)
    inputs, targets = make(tokens, width, vocabulary, torch.bfloat16)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in inputs]
    targets = targets.to(DEVICE)
    with OpRecorder() as recorder:
        linear_cross_entropy(*leaves[:2], targets, bias=leaves[2])
    with OpRecorder() as evaluation, torch.no_grad():
        linear_cross_entropy(*leaves[:2], targets, bias=leaves[2])
    chunk = chunks.LEAST_ROWS * 144
    # the interpreter's products widen their factors: a third one
    assert recorder.allocated[:2] == [chunk, chunk]
    assert recorder.allocated[2] <= chunk
    assert sum(evaluation.allocated) < sum(recorder.allocated) - chunk
    assert recorder.allocated[0] < tokens * vocabulary / 2


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [32000, 256001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabularies_on_a_gpu(dtype, vocabulary):
    check(*make(700, 256, vocabulary, dtype), rows=256)
