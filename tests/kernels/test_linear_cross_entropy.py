"""The op against the float64 reference: values, gradients, ignored and weighted tokens, refusals."""

import math

import pytest
import torch

from kernels import linear_cross_entropy
from kernels.linear_cross_entropy.chunks import Wanted, token_gradients, token_losses
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from kernels.testing import assert_close, poisoned_memory

NAMES = ("loss", "hidden", "weight", "bias")
# tokens, width, vocabulary
SHAPES = [
    (1, 1, 1), (1, 3, 2), (2, 1, 1), (1, 8, 97), (97, 5, 1), (7, 13, 11), (16, 16, 16), (63, 17, 65), (65, 31, 63),
    (101, 24, 211), (130, 7, 5), (3, 40, 1009),
]  # fmt: skip
EVERYTHING = Wanted(hidden=True, weight=True, bias=True)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield


def make(tokens, width, vocabulary, dtype=torch.float64, *, scale=3.0, seed=0):
    """hidden, weight, bias and targets; logits vary by about `scale`, and one token in five fits its target well."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, bias = normal(vocabulary, width), normal(vocabulary)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    hidden = normal(tokens, width) * scale / math.sqrt(width)
    hidden[1::5] += 4 * scale * weight[targets[1::5]] / width
    return [hidden.to(dtype), weight.to(dtype), bias.to(dtype)], targets


def differentiate(function, inputs, targets, **options):
    """Loss and gradients of `function` in float64, by autograd."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loss = function(*leaves[:2], targets, bias=leaves[2], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check_chunks(inputs, targets, limits, *, factors=None, rows=None):
    hidden, weight, bias = inputs
    factors = torch.ones(len(targets), dtype=torch.float64) if factors is None else factors
    expected = differentiate(
        linear_cross_entropy_reference, inputs, targets, token_weights=factors, reduction="sum"
    )
    found = token_gradients(
        hidden,
        weight,
        bias,
        targets,
        factors.to(torch.promote_types(hidden.dtype, torch.float32)),
        EVERYTHING,
        rows=rows,
    )
    sums = [(found.losses.double() * factors).sum(), *found[1:]]
    for name, actual, truth, limit in zip(NAMES, sums, expected, limits, strict=True):
        assert_close(actual, truth, limit, name)
    values = token_losses(hidden, weight, bias, targets, rows=rows)
    truths = linear_cross_entropy_reference(
        hidden.double(), weight.double(), targets, bias=bias.double(), reduction="none"
    )
    assert_close(values, truths, limits[0], "values")


@pytest.mark.parametrize("rows", [1, 16, None])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), SHAPES)
def test_chunks_equal_the_reference_for_odd_shapes(tokens, width, vocabulary, rows):
    # measured: at most 2e-15
    check_chunks(*make(tokens, width, vocabulary), [2e-14] * 4, rows=rows)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_fp32_is_summed_in_fp32(scale):
    # measured: loss 1e-7, gradients 4e-7; at logits beyond 100, whose own rounding is 4e-6 then, 1.5e-6
    limit = 4e-6 if scale == 30 else 1e-6
    check_chunks(*make(131, 72, 1009, torch.float32, scale=scale), [5e-7, *[limit] * 3], rows=50)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_summed_in_fp32(dtype):
    # the reference gets the same rounded inputs; measured: loss 8e-8, gradients 5e-7
    check_chunks(*make(131, 72, 1009, dtype), [1e-6] * 4, rows=50)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_far_from_zero(offset, dtype):
    """Neither overflow nor, but for the rounding of the logits themselves, a loss of digits."""
    (hidden, weight, bias), targets = make(33, 16, 40, dtype)
    # products of quarters stay exact beside the offset in fp32; measured 2e-7 and 3e-16
    hidden, weight, bias = (torch.round(tensor * 4) / 4 for tensor in (hidden, weight, bias))
    limit = 1e-13 if dtype == torch.float64 else 1e-6
    check_chunks([hidden, weight, bias + offset], targets, [limit] * 4, rows=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_fits_keeps_the_digits_of_its_small_loss(dtype):
    """Logits 0 and, for the target, 2 to 60: down to 1e-25, which 1 - softmax would lose at 1e-7 or 1e-16."""
    fit = torch.linspace(2.0, 60.0, 30, dtype=dtype)
    hidden, weight = fit[:, None].clone().requires_grad_(), torch.zeros(8, 1, dtype=dtype)
    weight[3] = 1.0
    losses = linear_cross_entropy(hidden, weight, torch.full((30,), 3), reduction="none")
    losses.sum().backward()
    odds = 7 * (-fit.double()).exp()
    assert ((losses.detach() / odds.log1p() - 1).abs() < 1e-6).all()
    assert ((hidden.grad.squeeze(1) / (-odds / (1 + odds)) - 1).abs() < 1e-6).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_op_gives_value_and_gradients_in_the_types_of_its_inputs(dtype, reduction):
    # measured: float64 1e-15, fp32 2e-7, and, for the rounding of the result, 1.7e-3 in bf16 and 2.1e-4 in fp16
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    inputs, targets = make(67, 24, 101, dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction=reduction)
    assert loss.shape == ()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    (loss * -2.5).backward()
    value, *gradients = differentiate(linear_cross_entropy_reference, inputs, targets, reduction=reduction)
    assert_close(loss.detach(), value, min(limit, 1e-6), "loss")
    for name, leaf, gradient in zip(NAMES[1:], leaves, gradients, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, -2.5 * gradient, limit, name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_and_weighted_tokens(reduction):
    inputs, targets = make(61, 12, 37)
    targets[::3] = -1
    weights = torch.linspace(-0.2, 2.0, 61, dtype=torch.float64)
    weights[10:20] = 0
    upstream = torch.linspace(-1.0, 3.0, 61, dtype=torch.float64) if reduction == "none" else 0.7
    found = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        loss = function(
            *leaves[:2], targets, bias=leaves[2], token_weights=weights, ignore_index=-1, reduction=reduction
        )
        found.append([loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves)])
    for name, ours, truth in zip(NAMES, *found, strict=True):
        assert_close(ours, truth, 1e-13, name)
    assert (found[0][1][::3] == 0).all()
    assert (found[0][1][10:20] == 0).all()


def test_what_is_ignored_may_be_anything():
    """Padding: neither its hidden state nor, where its weight is 0, its target is looked at. A mask is a weight."""
    (hidden, weight, bias), targets = make(20, 8, 30)
    hidden[12:] = float("nan")
    mask = torch.arange(20) < 12
    targets[12:] = 999
    leaf = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(leaf, weight, targets, bias=bias, token_weights=mask)
    loss.backward()
    truth = linear_cross_entropy_reference(hidden[:12], weight, targets[:12], bias=bias)
    assert_close(loss.detach(), truth, 1e-14)
    assert leaf.grad[12:].count_nonzero() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("cause", ["ignored", "weights", "no tokens"])
def test_nothing_to_learn_from_costs_nothing(cause, reduction):
    (hidden, weight, bias), targets = make(0 if cause == "no tokens" else 9, 8, 30)
    weights = torch.zeros(len(targets)) if cause == "weights" else None
    if cause == "ignored":
        targets[:] = -100
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    loss = linear_cross_entropy(
        hidden, weight, targets, bias=bias, token_weights=weights, reduction=reduction
    )
    loss.sum().backward()
    assert loss.count_nonzero() == 0
    assert all(leaf.grad.count_nonzero() == 0 and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_weights_of_one_and_no_bias_are_the_plain_loss():
    (hidden, weight, _), targets = make(40, 12, 50)
    plain = linear_cross_entropy(hidden, weight, targets)
    assert plain == linear_cross_entropy(hidden, weight, targets, token_weights=torch.ones(40))
    assert_close(plain, linear_cross_entropy_reference(hidden, weight, targets), 1e-15)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    loss = linear_cross_entropy(torch.zeros(5, 3), torch.randn(1000, 3), torch.arange(5))
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_fp32_parameters_beside_bf16_activations_keep_fp32_gradients():
    (hidden, weight, bias), targets = make(67, 24, 101, torch.float32)
    hidden = hidden.bfloat16()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    linear_cross_entropy(hidden, weight, targets, bias=bias).backward()
    expected = differentiate(linear_cross_entropy_reference, leaves, targets)[1:]
    for name, leaf, gradient, limit in zip(NAMES[1:], leaves, expected, (3e-3, 1e-6, 1e-6), strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, gradient, limit, name)


def test_op_takes_non_contiguous_inputs():
    (hidden, weight, bias), targets = make(38, 22, 58)
    strided = [hidden.T.contiguous().T[::2, ::2], weight.T.contiguous().T[::2, ::2], bias[::2]]
    targets = torch.stack([targets % 29, targets], 1)[::2, 0]
    assert not any(tensor.is_contiguous() for tensor in (*strided, targets))
    leaves = [part.detach().requires_grad_() for part in strided]
    loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2])
    expected = differentiate(linear_cross_entropy_reference, strided, targets)
    for name, actual, truth in zip(NAMES[1:], torch.autograd.grad(loss, leaves), expected[1:], strict=True):
        assert_close(actual, truth, 1e-13, name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_op_passes_gradcheck(reduction):
    inputs, targets = make(5, 4, 7)
    targets[2] = -100

    def function(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


def test_op_is_not_cast_down_by_autocast():
    inputs, targets = make(64, 32, 99, torch.float32)
    doubles = [tensor.double() for tensor in inputs]
    expected = linear_cross_entropy_reference(*doubles[:2], targets, bias=doubles[2], reduction="none")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction="none")
        losses.sum().backward()
    assert_close(losses.detach(), expected, 1e-6)  # bf16 logits give 1e-2
    truth = differentiate(linear_cross_entropy_reference, inputs, targets, reduction="sum")
    assert_close(leaves[0].grad, truth[1], 1e-6)


def test_backward_twice_and_second_derivative():
    inputs, targets = make(6, 4, 9)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(*leaves[:2], targets, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, leaves[:2], create_graph=True)


def test_not_a_number_shows_in_the_loss():
    (hidden, weight, _), targets = make(6, 4, 9)
    hidden[2, 1] = float("nan")
    assert linear_cross_entropy(hidden, weight, targets).isnan()


def refused():
    hidden, weight, targets = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
    ones = torch.ones(4)
    yield "hidden must be \\[T, D\\]", (hidden[0], weight, targets), {}
    yield "hidden must be \\[T, D\\]", (hidden, weight[:, :2], targets), {}
    yield "V at least 1", (hidden, weight[:0], targets), {}
    yield "targets must be int64 of shape \\(4,\\)", (hidden, weight, targets[:3]), {}
    yield "targets must be int64", (hidden, weight, targets.int()), {}
    yield "must be 0 to 4, or -100 to be ignored; got 5", (hidden, weight, targets + 5), {}
    yield (
        "must be 0 to 4, or -7 to be ignored; got -100",
        (hidden, weight, targets - 100),
        {"ignore_index": -7},
    )
    yield "bias must have shape \\(5,\\)", (hidden, weight, targets), {"bias": torch.ones(1)}
    yield "token_weights must have shape \\(4,\\)", (hidden, weight, targets), {"token_weights": ones[:2]}
    yield "need no gradient", (hidden, weight, targets), {"token_weights": ones.clone().requires_grad_()}
    yield "mean, sum or none; got 'avg'", (hidden, weight, targets), {"reduction": "avg"}
    yield "float64 all or none", (hidden, weight.double(), targets), {}
    yield "must be floating-point", (hidden.long(), weight, targets), {}
    yield "one device", (hidden, weight.to("meta"), targets), {}


@pytest.mark.parametrize(("message", "inputs", "options"), refused())
def test_bad_input_is_refused_with_the_reason(message, inputs, options):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*inputs, **options)
