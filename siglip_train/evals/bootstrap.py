"""How far a metric may be off by the choice of images: percentile intervals from resampled images."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_LEVEL = 0.95
# weights held at a time: 4M in fp64 are 32 MiB
_WEIGHTS_AT_A_TIME = 1 << 22


class Share(NamedTuple):
    """A metric as hits over trials of n images, averaged over K parts such as languages: both `[n, K]` or `[n]`."""

    hits: Tensor
    trials: Tensor


def check_resamples(resamples: int) -> None:
    """Raise ValueError for a `bootstrap` that is no number of resamples; 0 = no intervals are wanted."""
    if resamples < 0:
        raise ValueError(f"bootstrap must not be negative, got {resamples}")


def confidence_intervals(shares: Mapping[str, Share], resamples: int) -> dict[str, float]:
    """Give `<metric>_low` and `<metric>_high`, the ends of a 95 % percentile interval, for every metric.

    Images are drawn with replacement, with all that belongs to them, by a generator of its own with a fixed seed: the
    same numbers on every rank and in every run. Parts without a trial in a resample are left out of its average.
    """
    columns = {name: [_column(part) for part in share] for name, share in shares.items()}
    images = len(next(iter(columns.values()))[0])
    drawn: dict[str, list[Tensor]] = {name: [] for name in columns}
    for weights in _weights(images, resamples):
        for name, (hits, trials) in columns.items():
            parts = (weights @ hits) / (weights @ trials)  # [r, K]
            drawn[name].append(parts.nanmean(dim=1))
    ends = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    return {
        f"{name}_{side}": value
        for name, parts in drawn.items()
        for side, value in zip(("low", "high"), torch.cat(parts).quantile(ends).tolist(), strict=True)
    }


def _column(values: Tensor) -> Tensor:
    values = values.double().cpu()
    return values[:, None] if values.ndim == 1 else values


def _weights(images: int, resamples: int) -> Iterator[Tensor]:
    """How often each image is drawn, `[r, n]` for r resamples at a time."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, _WEIGHTS_AT_A_TIME // images)
    for first in range(0, resamples, rows):
        drawn = torch.randint(images, (min(rows, resamples - first), images), generator=generator)
        ones = torch.ones_like(drawn, dtype=torch.float64)
        yield torch.zeros_like(ones).scatter_add_(1, drawn, ones)
