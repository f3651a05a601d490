"""Numbers of a classification from the rank of each image's best right class: overall, by class and by group."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from siglip_train.evals.bootstrap import Share, confidence_intervals
from siglip_train.evals.ranking import recall_at


def accuracy_metrics(ranks: Tensor, candidates: int, owners: Tensor | None = None) -> dict[str, float]:
    """Give acc1, acc5 (from 5 candidates on) and mean_per_class_recall, under CLIP_benchmark's names.

    ranks `[n]` as `best_ranks` gives them, owners `[n]` the class of each image, None = it has no single one and so
    no recall a class. The recall is averaged over the classes that occur.
    """
    metrics = {"acc1": recall_at(ranks, 1)}
    if candidates >= 5:
        metrics["acc5"] = recall_at(ranks, 5)
    if owners is not None:
        seen, hits = seen_and_hits(ranks, owners)
        metrics["mean_per_class_recall"] = (hits[seen > 0] / seen[seen > 0]).mean().item()
    return metrics


def accuracy_intervals(ranks: Tensor, candidates: int, resamples: int) -> dict[str, float]:
    """Give the ends of the confidence intervals of acc1 and, from 5 candidates on, acc5."""
    cuts = {"acc1": 1, "acc5": 5} if candidates >= 5 else {"acc1": 1}
    trials = torch.ones(len(ranks))
    return confidence_intervals({name: Share(ranks < cut, trials) for name, cut in cuts.items()}, resamples)


def seen_and_hits(ranks: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Give the images of each class and those of them that are right: `[C]`, `[C]` fp64."""
    seen = torch.bincount(owners).double()
    return seen, torch.bincount(owners[ranks < 1], minlength=len(seen)).double()


def group_metrics(ranks: Tensor, groups: Sequence[str]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Give `<group>/acc1` of each group, the worst, and how far the best is above it; and the groups as a table.

    The difference of best and worst is what SigLIP 2 (section 3.5) reports as disparity.
    """
    names = sorted(set(groups))
    owners = torch.tensor([names.index(group) for group in groups], device=ranks.device)
    seen, hits = seen_and_hits(ranks, owners)
    shares = (hits / seen).tolist()
    table = [
        {"name": name, "images": int(count), "acc1": share}
        for name, count, share in zip(names, seen.tolist(), shares, strict=True)
    ]
    metrics = {"acc1_worst_group": min(shares), "acc1_disparity": max(shares) - min(shares)}
    # a slash separates group and metric
    return metrics | {f"{row['name'].replace('/', '-')}/acc1": row["acc1"] for row in table}, table


def mean_average_precision(scores: Tensor, is_right: Tensor) -> float:
    """Average, over classes, the precision at each right image in the order of scores: both `[n, C]`.

    A class without an image counts 0, as in CLIP_benchmark.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = is_right.gather(0, order).double()  # [n, C]
    precision = hits.cumsum(dim=0) / torch.arange(1, len(hits) + 1, device=hits.device)[:, None]
    return ((precision * hits).sum(dim=0) / hits.sum(dim=0).clamp(min=1)).mean().item()
