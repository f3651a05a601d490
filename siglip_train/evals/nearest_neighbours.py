"""Classification by the nearest training images, weighted by how near they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_train.evals.features import Features
from siglip_train.evals.ranking import SCORES_AT_A_TIME


@dataclass(kw_only=True)
class NearestNeighbours:
    """The protocol of DINO (arXiv 2104.14294, 4.1): the k nearest by cosine vote by exp(cosine / temperature)."""

    k: int = 20
    temperature: float = 0.07
    center: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.k < 1 or self.temperature <= 0:
            raise ValueError("k must be at least 1 and temperature above 0")

    def fit(self, features: Features) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        """Vote for each test image."""
        train, test = (torch.nn.functional.normalize(part, dim=1) for part in (features.train, features.test))
        rows = max(1, SCORES_AT_A_TIME // len(train))
        votes = [self._votes(block @ train.T, features) for block in test.split(rows)]
        return {"knn": [features.test_ranks(torch.cat(votes))]}, {}

    def _votes(self, cosines: Tensor, features: Features) -> Tensor:
        """`[q, n]` -> `[q, classes]`, on the CPU, because a GPU adds in no fixed order."""
        near, place = cosines.topk(min(self.k, cosines.shape[1]), dim=1)  # [q, k]
        votes = torch.zeros(len(cosines), features.classes, dtype=torch.float64)
        weights = (near.double() / self.temperature).exp()
        return votes.scatter_add_(1, features.train_labels[place].cpu(), weights.cpu())
