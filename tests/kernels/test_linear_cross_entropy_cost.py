"""What linear cross-entropy costs, counted: products, the largest tensors, what waits for backward."""

import pytest
import torch

from kernels import linear_cross_entropy
from kernels.linear_cross_entropy import chunks
from kernels.linear_cross_entropy.chunks import choose_rows
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from kernels.testing import OpRecorder, assert_close
from tests.kernels.test_linear_cross_entropy import differentiate, make


def products(recorder):
    return recorder.calls["mm"] + recorder.calls["addmm"]


@pytest.mark.parametrize(("wanted", "count"), [(0, 2), (1, 2), (2, 1)])
def test_a_gradient_alone_costs_no_more_than_it_needs(wanted, count):
    inputs, targets = make(9, 8, 12)
    inputs[wanted].requires_grad_()
    with OpRecorder() as recorder:
        loss = linear_cross_entropy(*inputs[:2], targets, bias=inputs[2])
    loss.backward()
    assert products(recorder) == count
    expected = differentiate(linear_cross_entropy_reference, inputs, targets)[1 + wanted]
    assert_close(inputs[wanted].grad, expected, 1e-13)


def test_without_gradients_only_the_logits_are_computed():
    inputs, targets = make(40, 16, 30)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with OpRecorder() as training:
        loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2])
    with OpRecorder() as evaluation, torch.no_grad():
        value = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2])
    assert (products(training), products(evaluation)) == (3, 1)
    assert not value.requires_grad
    assert value == loss


def test_no_tensor_of_tokens_times_vocabulary_is_made(monkeypatch):
    tokens, width, vocabulary = 1000, 24, 3000
    monkeypatch.setitem(chunks.BUFFER_MIB, "chunked", 1)
    inputs, targets = make(tokens, width, vocabulary, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    saved = []
    with (
        OpRecorder() as recorder,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        linear_cross_entropy(*leaves[:2], targets, bias=leaves[2]).backward()
    chunk = chunks.LEAST_ROWS * (vocabulary + 8)
    assert recorder.allocated[0] == chunk
    assert sum(recorder.allocated) <= chunk + 4 * (tokens + vocabulary) * width + 20 * tokens + 8 * vocabulary
    # what waits for backward is the gradients
    assert sum(saved) <= (tokens + vocabulary) * width + vocabulary + 10


def test_the_recorder_sees_the_reference_hold_every_logit():
    inputs, targets = make(100, 8, 300)
    with OpRecorder() as recorder:
        differentiate(linear_cross_entropy_reference, inputs, targets)
    assert recorder.allocated[:3] == [100 * 300] * 3


@pytest.mark.parametrize("tokens", [1, 63, 64, 100, 5000, 1_000_000])
@pytest.mark.parametrize(("vocabulary", "size"), [(1, 4), (32_000, 4), (256_001, 6), (5_000_000, 6)])
def test_chunks_are_bounded_and_even(tokens, vocabulary, size):
    rows = choose_rows(tokens, vocabulary, size, 256)
    assert rows <= chunks.LEAST_ROWS or rows * vocabulary * size <= 256 * 2**20
    assert 1 <= rows <= tokens + 63
    if tokens > 64 * chunks.LEAST_ROWS:
        assert -(-tokens // rows) * rows < tokens * 1.1
