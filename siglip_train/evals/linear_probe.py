"""A linear classifier on frozen features, its penalty chosen on a part of the training images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_train.evals.features import Features


@dataclass(kw_only=True)
class LinearProbe:
    """Logistic regression, as in CLIP (arXiv 2103.00020, A.3), with a grid for its search.

    Features are whitened by the training images. Mean cross-entropy plus l2 / 2 times the squared weights (without
    the bias) is minimised by L-BFGS over all images at once. Each l2 is tried on all but `held_out` of the training
    images, drawn by a fixed seed; the one that gets most of those right (of equals the largest) is taken for all.
    fp64, so that the optimum, and not the order of sums, decides.
    """

    l2: tuple[float, ...] | list[float] = tuple(10.0**power for power in range(2, -7, -1))
    held_out: float = 0.2
    iterations: int = 100
    center: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.l2 or min(self.l2) <= 0 or not 0 < self.held_out < 1 or self.iterations < 1:
            raise ValueError("l2 must be above 0, held_out between 0 and 1, iterations at least 1")

    def fit(self, features: Features) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        """Choose the penalty, train on everything, classify the test images."""
        train, test = features.whitened()
        labels = features.train_labels
        l2 = self._chosen(train, labels, features.classes) if len(self.l2) > 1 else self.l2[0]
        weights = logistic_regression(train, labels, features.classes, l2, iterations=self.iterations)
        return {"lp": [features.test_ranks(linear_scores(weights, test))]}, {"lp_l2": l2}

    def _chosen(self, train: Tensor, labels: Tensor, classes: int) -> float:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
        held_out, kept = order.tensor_split([max(1, round(self.held_out * len(order)))])
        best, most = max(self.l2), -1
        weights = None
        # from strong to weak, each from the solution before it
        for l2 in sorted(self.l2, reverse=True):
            weights = logistic_regression(
                train[kept], labels[kept], classes, l2, iterations=self.iterations, start=weights
            )
            right = int((linear_scores(weights, train[held_out]).argmax(dim=1) == labels[held_out]).sum())
            if right > most:
                best, most = l2, right
        return best


def linear_scores(weights: Tensor, features: Tensor) -> Tensor:
    """Give `[n, C]` of weights `[C, E + 1]`, whose last column is the bias, and features `[n, E]`."""
    return features @ weights[:, :-1].T + weights[:, -1]


def logistic_regression(
    features: Tensor, labels: Tensor, classes: int, l2: float, *, iterations: int, start: Tensor | None = None
) -> Tensor:
    """Minimise mean cross-entropy + l2 / 2 |weights|^2: features `[n, E]`, labels `[n]` -> `[C, E + 1]`."""
    weights = features.new_zeros(classes, features.shape[1] + 1) if start is None else start

    def loss(weights: Tensor) -> Tensor:
        value = torch.nn.functional.cross_entropy(linear_scores(weights, features), labels)
        value = value + l2 / 2 * weights[:, :-1].square().sum()
        value.backward()
        return value

    return minimised(weights, loss, iterations=iterations)


def minimised(start: Tensor, backward: Callable[[Tensor], Tensor], *, iterations: int) -> Tensor:
    """Go from `start` to where a smooth function is least, by L-BFGS; `backward` gives value and gradient."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def value() -> Tensor:
        optimizer.zero_grad()
        return backward(weights)

    with torch.enable_grad():
        optimizer.step(value)  # type: ignore[no-untyped-call]
    return weights.detach()
