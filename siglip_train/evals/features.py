"""What probes are trained on and measured with: pooled outputs of a frozen image tower, with one label each."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from siglip_train.errors import UserError
from siglip_train.evals.base import ImageSet
from siglip_train.evals.ranking import ranks_of_scores


class Features(NamedTuple):
    """Pooled outputs `[n, E]`, `[m, E]` fp32, not normalised, and the class of each, one of 0..classes-1."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int

    def whitened(self) -> tuple[Tensor, Tensor]:
        """Give train and test as `whitened` does."""
        return whitened(self.train, self.test)

    def test_ranks(self, scores: Tensor) -> Tensor:
        """Give the ranks `[m]` of the test images' classes among scores `[m, classes]`."""
        is_right = torch.nn.functional.one_hot(self.test_labels, self.classes).bool()
        return ranks_of_scores(scores, is_right.to(scores.device))


class Method(Protocol):
    """A way to classify by training features. The same on every rank, and in every run.

    center: the share of the squashed images, in the middle, that its protocol embeds (`EvaluationSource`).
    """

    center: float

    def fit(self, features: Features) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        """Give the ranks `[m]` of the test images' classes, by name and repetition, and numbers to log."""


def whitened(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale both `[n, E]`, `[m, E]` by the mean and deviation + 1e-5 of train; fp64, as big_vision does."""
    train, test = train.double(), test.double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0) + 1e-5
    return (train - mean) / deviation, (test - mean) / deviation


def features_of(train: ImageSet, test: ImageSet, device: torch.device) -> Features:
    """Join two sets. Raises UserError for an image with no label or several."""
    train_labels, test_labels = (single_labels(part) for part in (train, test))
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    return Features(
        train.embeddings.to(device),
        train_labels.to(device),
        test.embeddings.to(device),
        test_labels.to(device),
        classes,
    )


def single_labels(images: ImageSet) -> Tensor:
    """Give the one label of each image: `[n]` int64. Raises UserError for an image with none or several."""
    assert images.labels is not None
    for key, labels in zip(images.keys, images.labels, strict=True):
        if len(labels) != 1 or labels[0] < 0:
            raise UserError(
                f"sample {key} has the labels {list(labels)}: a probe needs one of each, 0 or more"
            )
    return torch.tensor([label for (label,) in images.labels])
