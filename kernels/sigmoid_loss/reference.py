"""The definition. Slow, holds the n x m logits, differentiable by autograd, any dtype: the op must agree with it."""

import torch
from torch import Tensor


def sigmoid_loss_block_reference(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, *, positives: int | None = 0
) -> Tensor:
    """Sum of -log sigmoid(z * logit) over all pairs of `[n, E]` images and `[m, E]` texts.

    z = 1 where text j belongs to image i (j = i + positives), else -1. positives=None: no text matches.
    """
    logits = scale * images @ texts.T + bias  # [n, m]
    row = torch.arange(len(images), device=images.device)[:, None]
    column = torch.arange(len(texts), device=images.device)
    matches = torch.zeros_like(logits, dtype=torch.bool) if positives is None else column == row + positives
    # softplus(-x) = -log sigmoid(x); F.softplus rounds off above 20, which float64 can tell
    return torch.logaddexp(torch.where(matches, -logits, logits), torch.zeros_like(logits)).sum()


def sigmoid_loss_reference(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The loss of SigLIP, section 3.2: sum over all pairs of the batch, divided by its number of images."""
    return sigmoid_loss_block_reference(images, texts, logit_scale, logit_bias) / len(images)
