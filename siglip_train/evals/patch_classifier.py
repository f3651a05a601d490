"""A linear classifier of patches, trained on tokens of a frozen tower and the labelled pixels under each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from siglip_train.distributed.collectives import add_over_ranks
from siglip_train.evals.linear_probe import linear_scores, minimised

# logits that are held at a time
_LOGITS = 2**24


class Patches(NamedTuple):
    """Patches of this rank's training images.

    tokens: `[n, D]` fp32. counts: `[n, C]` fp32, pixels of each class under each patch. held_out: `[n]` bool, of the
    images by which a penalty is chosen.
    """

    tokens: Tensor
    counts: Tensor
    held_out: Tensor

    def where(self, chosen: Tensor) -> "Patches":
        """Some of them."""
        return Patches(self.tokens[chosen], self.counts[chosen], self.held_out[chosen])

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and counts, so many at a time that their logits fit."""
        rows = max(1, _LOGITS // self.counts.shape[1])
        yield from zip(self.tokens.split(rows), self.counts.split(rows), strict=True)


@dataclass(frozen=True)
class PatchClassifier:
    """weights: `[C, D + 1]`, the last column the bias, of tokens shifted by `mean` and divided by `deviation`."""

    weights: Tensor
    mean: Tensor
    deviation: Tensor
    l2: float

    def logits(self, tokens: Tensor) -> Tensor:
        """`[..., D]` -> `[..., C]`."""
        return linear_scores(self.weights, (tokens - self.mean) / self.deviation)


def trained(patches: Patches, l2: list[float], *, iterations: int) -> PatchClassifier:
    """Minimise the mean cross-entropy of labelled pixels, each with the logits of its patch, by L-BFGS.  # all ranks

    It is `LinearProbe` for tokens: whitened by the training images, l2 / 2 times the squared weights added, each l2
    tried on all but the held-out images; the one that gets most of their pixels right (of equals the largest) is taken
    for all. Sums of loss and gradient go over all ranks; each keeps its own tokens.
    """
    mean, deviation = _spread(patches.tokens)
    patches = patches._replace(tokens=(patches.tokens - mean) / deviation)
    chosen = _chosen(patches, l2, iterations) if len(l2) > 1 else l2[0]
    return PatchClassifier(_fitted(patches, chosen, iterations, None), mean, deviation, chosen)


def _spread(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation + 1e-5 of each feature, over all ranks."""
    wide = tokens.double()
    sums = add_over_ranks(torch.cat([wide.sum(0), wide.new_tensor([len(wide)])]))
    mean = sums[:-1] / sums[-1]
    variance = add_over_ranks((wide - mean).square().sum(0)) / sums[-1]
    return mean.float(), (variance.sqrt() + 1e-5).float()


def _chosen(patches: Patches, penalties: list[float], iterations: int) -> float:
    kept, asked = patches.where(~patches.held_out), patches.where(patches.held_out)
    best, most, weights = max(penalties), -1, None
    # from strong to weak, each from the solution before it
    for l2 in sorted(penalties, reverse=True):
        weights = _fitted(kept, l2, iterations, weights)
        right = asked.counts.new_zeros((), dtype=torch.float64)
        for tokens, counts in asked.pieces():
            found = linear_scores(weights, tokens).argmax(dim=1, keepdim=True)
            right += counts.gather(1, found).double().sum()
        total = int(add_over_ranks(right))
        if total > most:
            best, most = l2, total
    return best


def _fitted(patches: Patches, l2: float, iterations: int, start: Tensor | None) -> Tensor:
    tokens, counts = patches.tokens, patches.counts
    if start is None:
        start = tokens.new_zeros(counts.shape[1], tokens.shape[1] + 1)
    total = float(add_over_ranks(counts.double().sum()))

    def backward(weights: Tensor) -> Tensor:
        value = weights.new_zeros(())
        for some, pixels in patches.pieces():
            losses = -(pixels * linear_scores(weights, some).log_softmax(dim=1)).sum() / total
            losses.backward()
            value += losses.detach()
        penalty = l2 / 2 * weights[:, :-1].square().sum()
        own = torch.zeros_like(weights) if weights.grad is None else weights.grad
        summed = add_over_ranks(torch.cat([own.flatten(), value[None]]))
        weights.grad = summed[:-1].view_as(weights)
        penalty.backward()
        return summed[-1] + penalty.detach()

    return minimised(start, backward, iterations=iterations)
