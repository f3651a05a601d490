"""The chunked op against its definition in float64: loss, sums and both gradients, at odd sizes, in every dtype."""

import pytest
import torch

from kernels.prototype_cross_entropy import op
from kernels.prototype_cross_entropy.op import Temperatures, prototype_cross_entropy
from kernels.prototype_cross_entropy.reference import prototype_cross_entropy_reference

TEMPERATURES = Temperatures(0.1, 0.05)


def inputs(rows: int, views: int, width: int, count: int, dtype: torch.dtype = torch.float64) -> list:
    generator = torch.Generator().manual_seed(rows + views)

    def unit(*shape: int) -> torch.Tensor:
        numbers = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(numbers, dim=-1).to(dtype)

    centre = torch.randn(count, generator=generator, dtype=torch.float64) / 8
    weights = torch.rand(rows, views, generator=generator, dtype=torch.float64)
    weights[0, 0] = 0
    return [
        unit(rows, views).requires_grad_(),
        unit(count).requires_grad_(),
        unit(rows),
        unit(count),
        centre.to(dtype),
        weights.to(dtype),
    ]


def results(function, given: list, **options) -> list[torch.Tensor]:
    *rest, weights = given
    sums = function(*rest, temperatures=TEMPERATURES, weights=weights, **options)
    gradients = torch.autograd.grad(3 * sums.loss, given[:2])
    return [each.detach().double() for each in (*sums, *gradients)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 7, 11), (37, 8, 13, 129), (2, 1, 24, 1000)])
def test_float64_equals_the_definition(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # a few rows a chunk, the last one shorter
    monkeypatch.setattr(op, "choose_rows", lambda rows, *_: max(1, rows // 3))
    given = inputs(*shape)
    expected = results(prototype_cross_entropy_reference, given)
    for found, each in zip(results(prototype_cross_entropy, given), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-11, atol=1e-12)


# RMS errors of loss, sums of logits and shares, gradients of student and prototypes; measured: half of these or less
LIMITS = {
    torch.float32: (1e-6, 1e-6, 2e-6, 2e-6, 2e-6),
    torch.float16: (3e-5, 6e-4, 6e-4, 1.2e-3, 1.2e-3),
    torch.bfloat16: (2e-4, 5e-3, 5e-3, 1e-2, 1e-2),
}


@pytest.mark.parametrize("dtype", LIMITS)
def test_shorter_factors_are_near_the_definition(dtype: torch.dtype) -> None:
    given = inputs(64, 4, 32, 257)
    expected = results(prototype_cross_entropy_reference, given)
    short = [each.detach().float().requires_grad_(each.requires_grad) for each in given]
    found = results(prototype_cross_entropy, short, compute_dtype=dtype)
    errors = [error(*pair) for pair in zip(found, expected, strict=True)]
    print(errors)
    assert all(each <= limit for each, limit in zip(errors, LIMITS[dtype], strict=True)), errors


def test_under_a_16_bit_autocast_factors_are_fp16_and_gradients_fp32() -> None:
    given = [each.detach().float().requires_grad_(each.requires_grad) for each in inputs(9, 2, 16, 40)]
    expected = results(prototype_cross_entropy, given, compute_dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(prototype_cross_entropy, given)
        assert prototype_cross_entropy(*given[:5]).loss.dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_no_tensor_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(op.BUFFER_MIB, "cpu", 1)
    rows, views, count = 256, 4, 512
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        each.numel()
                        for each in torch.utils._pytree.tree_leaves(made)
                        if isinstance(each, torch.Tensor)
                    ),
                ]
            )
            return made

    given = inputs(rows, views, 8, count, torch.float32)
    with Largest():
        results(prototype_cross_entropy, given)
    assert largest * 4 <= 2**20 < rows * count * 4 * views


def test_only_what_is_wanted_is_made() -> None:
    given = inputs(4, 2, 8, 16)
    frozen = [given[0].detach(), *given[1:]]
    sums = prototype_cross_entropy(*frozen[:5], temperatures=TEMPERATURES)
    (gradient,) = torch.autograd.grad(sums.loss, [frozen[1]])
    assert gradient.abs().sum() > 0
    assert not sums.logits.requires_grad
    assert not prototype_cross_entropy(*(each.detach() for each in given[:5])).loss.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, lambda each: each[:, 0]), r"student must be \[R, V, D\]"),
        ((2, lambda each: each[:-1]), r"teacher \[R, D\]"),
        ((4, lambda each: each[:-1]), r"centre \[K\]"),
        ((3, lambda each: each.float()), "float64 all or none"),
        ((1, lambda each: each.long()), "floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(change: tuple, message: str) -> None:
    given = [each.detach() for each in inputs(3, 2, 4, 5)[:5]]
    given[change[0]] = change[1](given[change[0]])
    with pytest.raises(ValueError, match=message):
        prototype_cross_entropy(*given)


def test_a_second_derivative_is_refused() -> None:
    given = inputs(3, 2, 4, 5)
    loss = prototype_cross_entropy(*given[:5]).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, given[:2], create_graph=True)
