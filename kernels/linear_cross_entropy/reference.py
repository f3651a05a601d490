"""The definition. Holds all T x V logits, differentiable by autograd, any dtype: the op must agree with it."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """-log softmax(hidden weight' + bias) at the targets: weighted mean, weighted sum, or a weighted row of losses."""
    losses = cross_entropy(linear(hidden, weight, bias), targets, reduction="none", ignore_index=ignore_index)
    factors = torch.ones_like(losses) if token_weights is None else token_weights.to(losses.dtype)
    if reduction == "none":
        return losses * factors
    counted = factors * (targets != ignore_index)
    total = counted.sum()
    return (losses * counted).sum() / (total if reduction == "mean" and total != 0 else 1)
