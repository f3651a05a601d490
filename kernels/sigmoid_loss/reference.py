"""The definition. Slow, holds the n x m logits, differentiable by autograd, any dtype: the ops must agree with it."""

import torch
from torch import Tensor

from kernels.sigmoid_loss.pairs import PairIds


def pairwise_loss_reference(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None = 0,
    ids: PairIds | None = None,
) -> Tensor:
    """-log sigmoid(z * logit) of all pairs of `[n, E]` images and `[m, E]` texts: `[n, m]`.

    z = 1 where text j belongs to image i (j = i + positives), else -1. positives=None: no text matches.
    Other pairs with equal ids, not negative, count ids.weight times.
    """
    logits = scale * images @ texts.T + bias  # [n, m]
    row = torch.arange(len(images), device=images.device)[:, None]
    column = torch.arange(len(texts), device=images.device)
    matches = torch.zeros_like(logits, dtype=torch.bool) if positives is None else column == row + positives
    # softplus(-x) = -log sigmoid(x); F.softplus rounds off above 20, which float64 can tell
    losses = torch.logaddexp(torch.where(matches, -logits, logits), torch.zeros_like(logits))
    if ids is None:
        return losses
    alike = (ids.images[:, None] == ids.texts) & (ids.texts >= 0) & ~matches
    return torch.where(alike, ids.weight * losses, losses)


def sigmoid_loss_block_reference(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None = 0,
    ids: PairIds | None = None,
) -> Tensor:
    """Sum over all pairs of a block."""
    return pairwise_loss_reference(images, texts, scale, bias, positives=positives, ids=ids).sum()


def sigmoid_loss_scores_reference(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None = 0,
    ids: PairIds | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over the pairs of each image `[n]` and of each text `[m]`."""
    losses = pairwise_loss_reference(images, texts, scale, bias, positives=positives, ids=ids)
    return losses.sum(1), losses.sum(0)


def sigmoid_loss_reference(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, ids: PairIds | None = None
) -> Tensor:
    """The loss of SigLIP, section 3.2: sum over all pairs of the batch, divided by its number of images."""
    return sigmoid_loss_block_reference(images, texts, logit_scale, logit_bias, ids=ids) / len(images)
