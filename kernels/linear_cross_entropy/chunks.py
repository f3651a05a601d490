"""Losses and gradients of tokens, a chunk of rows of logits at a time: no T x V tensor, on any device.

Products are the library's. What stands between them, from logits to their gradient, is `softmax.py` or, on a GPU, the
Triton kernel: both turn a chunk of logits into losses and G, the gradient with respect to the logits.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import Implementation, force, implementation
from kernels.linear_cross_entropy import softmax
from kernels.products import multiply
from kernels.testing import Comparison

# For the logits of a chunk and their gradient. On a CPU larger chunks are no faster; on a GPU the gradient of weight,
# which every chunk adds to, would take a third of the time with half of this (README).
BUFFER_MIB: dict[Implementation, int] = {"chunked": 64, "triton": 2048}
# fewer would make the products slow, whatever the vocabulary
LEAST_ROWS = 128
# so that rows of any vocabulary begin where the matrix units can load them (16 bytes)
_ALIGNED = 16
# fp16 ends at 6e-8, while a probability of one in 256k is 4e-6: with this factor it keeps its digits
_UNIT = {torch.float16: 1024}


class Wanted(NamedTuple):
    """Which gradients are to be made; the others cost nothing."""

    hidden: bool
    weight: bool
    bias: bool


class TokenGradients(NamedTuple):
    """losses `[T]`, unweighted, and gradients of sum(factor * loss), in float32, or float64 for float64 input."""

    losses: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, rows: int | None = None
) -> Tensor:
    """The losses of `token_gradients` alone, at a third of the work: `[T]`."""
    work = _Work(hidden, weight, bias, rows)
    losses = hidden.new_empty(len(hidden), dtype=work.dtype)
    for part, logits in work.chunks():
        losses[part] = work.step(logits, targets[part])
    return losses


@torch.no_grad()
def token_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factors: Tensor,
    wanted: Wanted,
    *,
    rows: int | None = None,
) -> TokenGradients:
    """Losses and gradients of sum(factor * loss) in one pass over the logits.

    hidden `[T, D]`, weight `[V, D]`, bias `[V]` or None, targets `[T]` within the vocabulary, factors `[T]`. rows: of
    logits held at a time, by default as many as `BUFFER_MIB` has room for.
    """
    work = _Work(hidden, weight, bias, rows)
    # G has values of about one whatever the factors, so that bf16 and fp16 hold it; the rest is put back at the end
    largest = factors.abs().amax() if len(factors) else factors.new_ones(())
    largest = torch.where(largest > 0, largest, 1)
    factors = factors / largest * work.unit
    losses = hidden.new_empty(len(hidden), dtype=work.dtype)
    d_hidden = torch.empty_like(work.hidden, dtype=work.dtype) if wanted.hidden else None
    d_weight = torch.zeros_like(work.weight, dtype=work.dtype) if wanted.weight else None
    d_bias = losses.new_zeros(len(weight)) if wanted.bias else None
    for part, logits in work.chunks():
        G = work.slopes(logits)  # [c, V]
        losses[part] = work.step(logits, targets[part], factors[part], G)
        if d_hidden is not None:
            multiply(G, work.weight, out=d_hidden[part], keep=0)
        if d_weight is not None:
            multiply(G.T, work.hidden[part], out=d_weight, keep=1)
        if d_bias is not None:
            d_bias += G.sum(0, dtype=work.dtype)
    for gradient in (d_hidden, d_weight, d_bias):
        if gradient is not None:
            gradient.mul_(largest / work.unit)
    return TokenGradients(losses, d_hidden, d_weight, d_bias)


class _Work:
    """The inputs of a call in the dtype of its products, and its buffers.

    In torch alone that is fp32 or float64. The kernel takes hidden in its own dtype, weight in the same, gives fp32
    logits, and writes G in that dtype again, as the matrix units want it.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int | None) -> None:
        kind = implementation(hidden, "linear_cross_entropy", _sample)
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        product_dtype = self.dtype if kind == "chunked" else hidden.dtype
        self.hidden, self.weight = hidden.to(product_dtype), weight.to(product_dtype)
        self.step: Callable[..., Tensor] = partial(
            _step(kind), bias=None if bias is None else bias.to(self.dtype)
        )
        self.unit = _UNIT.get(product_dtype, 1)
        self._in_place = product_dtype == self.dtype
        size = self.dtype.itemsize + (0 if self._in_place else product_dtype.itemsize)
        self._rows = rows or choose_rows(len(hidden), len(weight), size, BUFFER_MIB[kind])
        self._width = ceil(len(weight) / _ALIGNED) * _ALIGNED

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their products `[c, V]` in one buffer that is used again and again; bias is not in them yet."""
        buffer = self._buffer(self.dtype)
        for start in range(0, len(self.hidden), self._rows):
            chunk = self.hidden[start : start + self._rows]
            logits = buffer[: len(chunk), : len(self.weight)]
            multiply(chunk, self.weight.T, out=logits, keep=0)
            yield slice(start, start + len(chunk)), logits

    def slopes(self, logits: Tensor) -> Tensor:
        """Where G of these logits goes: in their place, if it has their dtype."""
        return logits if self._in_place else self._beside[: len(logits), : logits.shape[1]]

    @cached_property
    def _beside(self) -> Tensor:
        return self._buffer(self.hidden.dtype)

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty(min(self._rows, len(self.hidden)), self._width, dtype=dtype)


def choose_rows(tokens: int, vocabulary: int, bytes_per_logit: int, buffer_mib: int) -> int:
    """Rows of a chunk: what the buffers have room for, `LEAST_ROWS` at least, and about as many in every chunk."""
    most = max(LEAST_ROWS, buffer_mib * 2**20 // (vocabulary * bytes_per_logit) // 64 * 64)
    chunks = max(1, ceil(tokens / most))
    return max(1, min(most, ceil(tokens / chunks / 64) * 64))


def _step(kind: Implementation) -> Callable[..., Tensor]:
    if kind == "chunked":
        return softmax.losses_and_slopes
    # here, because importing Triton takes long and machines without a GPU need not have it
    from kernels.linear_cross_entropy import triton_softmax

    return triton_softmax.losses_and_slopes


def _sample(device: torch.device, dtype: torch.dtype) -> Iterator[Comparison]:
    """For the self-check: two whole blocks of the row and a part, an odd vocabulary, a chunk that is not full."""
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, width = 24, 4999, 72
    numbers = torch.randn(
        tokens + vocabulary, width + 1, generator=generator, dtype=torch.float64, device="cpu"
    )
    numbers = numbers.to(device, dtype)
    hidden, (weight, bias) = numbers[:tokens, 1:], (numbers[tokens:, 1:] / 4, numbers[tokens:, 0])
    # repeated targets, the first and the last
    targets = torch.arange(tokens, device=device) * 1999 % vocabulary
    targets[-3:] = vocabulary - 1
    factors = torch.linspace(-0.5, 1.0, tokens, device=device)
    inputs, exact = (hidden, weight, bias), (hidden.double(), weight.double(), bias.double())
    wanted = Wanted(hidden=True, weight=True, bias=True)
    with force("triton"):
        losses = token_losses(*inputs, targets, rows=16)
        actual = token_gradients(*inputs, targets, factors, wanted, rows=16)
    with force("chunked"):
        expected = token_gradients(*exact, targets, factors.double(), wanted, rows=16)
    yield Comparison("losses without gradients", losses, expected.losses, is_rounded=False)
    for name, found, truth in zip(expected._fields, actual, expected, strict=True):
        assert found is not None
        assert truth is not None
        yield Comparison(name, found, truth, name != "losses")
