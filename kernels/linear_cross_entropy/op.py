"""`linear_cross_entropy`: checks, the tokens that count, autograd."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.linear_cross_entropy.chunks import Wanted, token_gradients, token_losses

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of the logits `hidden weight' + bias`, which are never held: only a chunk of rows at a time.

    hidden: `[T, D]`. weight: `[V, D]`, bias: `[V]`; their dtype may differ from that of hidden (fp32 parameters
    beside bf16 activations), but float64 is for all or none. targets: `[T]`, int64, 0 to V - 1, or ignore_index.
    token_weights: `[T]`, a factor for the loss of each token, or a mask; no gradient reaches them.
    reduction: "mean" = sum(w loss) / sum(w) over the tokens that are not ignored, 0 if that sum of weights is 0;
    "sum" = sum(w loss); "none" = w loss for each token, `[T]`, 0 where ignored.

    Returns float32 (float64 for float64 input), differentiable once in hidden, weight and bias. For "mean" and "sum"
    gradients are made here and scaled in backward; those of "none" are made in backward, which computes the logits
    again. Tokens that are ignored or have the weight 0 cost nothing. To find them, and to check the targets, the CPU
    waits for a GPU at the start of each call. Autocast is not followed.

    Raises ValueError for shapes, dtypes, devices and targets that do not fit, RuntimeError for a second derivative.
    """
    if token_weights is None:
        token_weights = torch.ones(targets.shape, device=targets.device)
    _check(hidden, weight, targets, bias, token_weights, reduction)
    kept = ((targets != ignore_index) & (token_weights != 0)).nonzero().squeeze(1)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    factors = token_weights.to(dtype)
    if len(kept) < len(targets):
        hidden, targets, factors = hidden.index_select(0, kept), targets[kept], factors[kept]
    _check_range(targets, len(weight), ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        if reduction == "none":
            losses = _TokenLosses.apply(hidden, weight, bias, targets) * factors
            return losses.new_zeros(len(token_weights)).index_copy(0, kept, losses)
        loss = _weighted_sum(hidden, weight, bias, targets, factors)
    if reduction == "sum":
        return loss.to(dtype)
    total = factors.sum(dtype=torch.float64)
    return (loss / torch.where(total == 0, 1, total)).to(dtype)


def _weighted_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factors: Tensor
) -> Tensor:
    inputs = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _WeightedSum.apply(*inputs, targets, factors)
    return _sum(token_losses(*inputs, targets), factors)


def _sum(losses: Tensor, factors: Tensor) -> Tensor:
    return (losses * factors).sum(dtype=torch.float64)


class _WeightedSum(torch.autograd.Function):
    """sum(factor * loss) in float64, with its gradients made in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factors: Tensor
    ) -> Tensor:
        wanted = Wanted(*ctx.needs_input_grad[:3])
        losses, *gradients = token_gradients(hidden, weight, bias, targets, factors, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return _sum(losses, factors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        gradients = [
            # straight into the final dtype: for a large vocabulary, another fp32 copy would be gigabytes
            None if saved is None else torch.mul(saved, upstream, out=torch.empty_like(saved, dtype=dtype))
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None)


class _TokenLosses(torch.autograd.Function):
    """The loss of each token; its gradients are made in backward, where the factors are known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        return token_losses(hidden, weight, bias, targets)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        hidden, weight, bias, targets = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            _, *gradients = token_gradients(hidden, weight, bias, targets, upstream, wanted)
        final = [
            None if gradient is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        return (*final, None)


def _refuse_second_derivative() -> None:
    # grad mode is on in backward only under create_graph=True
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy has no second derivative: call backward without create_graph=True, "
            "or differentiate kernels.linear_cross_entropy.reference"
        )


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    token_weights: Tensor,
    reduction: str,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(
            "linear_cross_entropy: hidden must be [T, D] and weight [V, D], V at least 1; got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: targets must be int64 of shape ({len(hidden)},), one for each row of hidden; "
            f"got {tuple(targets.shape)} {targets.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias must have shape ({len(weight)},), as weight has rows; got {tuple(bias.shape)}"
        )
    if token_weights.shape != targets.shape or token_weights.requires_grad:
        raise ValueError(
            f"linear_cross_entropy: token_weights must have shape {tuple(targets.shape)} and need no gradient; got "
            f"{tuple(token_weights.shape)}, requires_grad={token_weights.requires_grad}"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"linear_cross_entropy: reduction must be mean, sum or none; got {reduction!r}")
    _check_types([hidden, weight] if bias is None else [hidden, weight, bias], targets, token_weights)


def _check_types(factors: list[Tensor], targets: Tensor, token_weights: Tensor) -> None:
    dtypes = [tensor.dtype for tensor in factors]
    if any(dtype not in _FLOATS for dtype in dtypes) or 0 < dtypes.count(torch.float64) < len(dtypes):
        raise ValueError(
            "linear_cross_entropy: hidden, weight and bias must be floating-point, float64 all or none; got "
            + ", ".join(map(str, dtypes))
        )
    devices = {str(tensor.device) for tensor in (*factors, targets, token_weights)}
    if len(devices) > 1:
        raise ValueError(f"linear_cross_entropy: all inputs must be on one device; got {sorted(devices)}")


def _check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    if len(targets) == 0:
        return
    low, high = torch.stack(targets.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"linear_cross_entropy: targets must be 0 to {vocabulary - 1}, or {ignore_index} to be ignored; "
            f"got {low if low < 0 else high}"
        )
