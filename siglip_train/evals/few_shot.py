"""Ridge regression from a few images a class: the "10-shot" column of SigLIP's tables."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from siglip_train.evals.features import Features, whitened

# so large that the bias is hardly regularised
_BIAS_FEATURE = 100.0


@dataclass(kw_only=True)
class RidgeFewShot:
    """The protocol of big_vision's `fewshot_lsr`.

    For each seed and number of shots, that many images of each class are drawn (all of a class that has fewer);
    features are whitened by them, targets are 1 for the class and -1 for others, and the penalty is l2. Images are
    squashed to 256 / 224 of the model's size, of which the middle is embedded: `center`; 1 embeds the whole image.
    ImageNet as published: the first 65,000 training images (`train.max_samples`), tested on the validation set.
    """

    shots: tuple[int, ...] | list[int] = (1, 5, 10, 25)
    seeds: int = 3
    l2: float = 2.0**10
    center: float = 224 / 256

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.shots, default=0) < 1 or self.seeds < 1 or self.l2 <= 0:
            raise ValueError("shots and seeds must be at least 1 and l2 above 0")

    def fit(self, features: Features) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        """Solve for every number of shots and every seed."""
        ranks: dict[str, list[Tensor]] = {f"{count}shot": [] for count in self.shots}
        for seed in range(self.seeds):
            drawn = draw(features.train_labels.cpu().numpy(), features.classes, seed)
            for count in self.shots:
                rows = torch.from_numpy(np.concatenate([places[:count] for places in drawn]))
                rows = rows.to(features.train.device)
                scores = ridge_scores(
                    features.train[rows],
                    features.train_labels[rows],
                    features.test,
                    features.classes,
                    self.l2,
                )
                ranks[f"{count}shot"].append(features.test_ranks(scores))
        return ranks, {}


def draw(labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """Give the places of each class's images in the order in which they are taken: big_vision's draw."""
    random = np.random.default_rng(seed)
    return [random.permutation(np.flatnonzero(labels == each)) for each in range(classes)]


def ridge_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int, l2: float) -> Tensor:
    """Solve (X'X + l2 I) W = X'Y in fp64 and give the test scores `[m, classes]`; train `[n, E]`, test `[m, E]`."""
    x, other = (torch.nn.functional.pad(part, (0, 1), value=_BIAS_FEATURE) for part in whitened(train, test))
    y = 2.0 * torch.nn.functional.one_hot(labels, classes).double() - 1
    if len(x) >= x.shape[1]:
        return other @ torch.linalg.solve(_with_penalty(x.T @ x, l2), x.T @ y)
    # fewer images than features: the same solution from the smaller matrix
    return other @ (x.T @ torch.linalg.solve(_with_penalty(x @ x.T, l2), y))


def _with_penalty(gram: Tensor, l2: float) -> Tensor:
    return gram + l2 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
