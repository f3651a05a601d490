"""From a chunk of logits to its losses and to the gradient with respect to the logits, in torch and in place."""

import torch
from torch import Tensor


def losses_and_slopes(
    logits: Tensor,
    targets: Tensor,
    factors: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Losses `[c]` of logits + bias, `[c, V]`, at targets `[c]`; logits are overwritten.

    slopes: where factor * (softmax - one-hot) goes, which may be logits itself; None: not wanted.
    """
    if bias is not None:
        logits += bias
    at_target = targets[:, None]
    peaks = logits.amax(1, keepdim=True)
    # before anything is rounded: the peak may be far from 0 and near the target's logit
    distances = peaks - logits.gather(1, at_target)  # [c, 1]
    # the target is left out of the sum, so that a token that fits keeps the digits of its small loss and slopes
    others = logits.sub_(peaks).exp_().scatter_(1, at_target, 0).sum(1, keepdim=True)
    of_target = distances.neg().exp()
    if slopes is not None and factors is not None:
        shares = factors[:, None] / (others + of_target)
        torch.mul(logits, shares, out=slopes)
        slopes.scatter_(1, at_target, -others * shares)
    return (distances + (others + (of_target - 1)).log1p()).squeeze(1)
