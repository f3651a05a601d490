"""Where the right answer stands among all candidates: what classification and retrieval both ask."""

import torch
from torch import Tensor

# scores held at a time; 16M in fp32 are 64 MiB, and a handful of temporaries of that size exist at once
SCORES_AT_A_TIME = 1 << 24


def best_ranks(queries: Tensor, candidates: Tensor, query_groups: Tensor, candidate_groups: Tensor) -> Tensor:
    """Give each query the 0-based rank of its best right candidate, by descending dot product.

    A candidate is right for a query of the same group. Equal scores: the lower candidate index comes first.
    A query without a right candidate gets rank M.

    queries `[Q, E]`, candidates `[M, E]`, their groups `[Q]` and `[M]` int64 -> `[Q]` int64.
    The Q x M scores are never held at once.
    """
    rows = max(1, SCORES_AT_A_TIME // max(1, len(candidates)))
    pieces = [
        ranks_of_scores(block @ candidates.T, groups[:, None] == candidate_groups[None, :])
        for block, groups in zip(queries.split(rows), query_groups.split(rows), strict=True)
    ]
    return torch.cat(pieces)


def best_ranks_in_sets(queries: Tensor, candidates: Tensor, targets: Tensor) -> Tensor:
    """Give the same for queries that name their right candidates: targets `[Q, S]` int64, filled up with -1."""
    rows = max(1, SCORES_AT_A_TIME // max(1, len(candidates)))
    pieces = [
        ranks_of_scores(block @ candidates.T, is_target(right, len(candidates)))
        for block, right in zip(queries.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(pieces)


def is_target(targets: Tensor, candidates: int) -> Tensor:
    """`[Q, S]` numbers of candidates, filled up with -1 -> `[Q, candidates]` bool."""
    marks = torch.zeros(len(targets), candidates + 1, dtype=torch.bool, device=targets.device)
    # -1 marks the last column, which is no candidate
    return marks.scatter_(1, targets % (candidates + 1), value=True)[:, :candidates]


def ranks_of_scores(scores: Tensor, is_right: Tensor) -> Tensor:
    """Give the rank of the best right candidate: scores `[Q, M]`, is_right `[Q, M]` bool -> `[Q]` int64."""
    # max returns the first of equal maxima
    best, place = scores.masked_fill(~is_right, -torch.inf).max(dim=1, keepdim=True)  # [q, 1]
    index = torch.arange(scores.shape[1], device=scores.device)
    is_before = (scores > best) | ((scores == best) & (index < place))
    return is_before.sum(dim=1).where(is_right.any(dim=1), scores.shape[1])


def top(queries: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Give the best candidates of each query: scores and indices, both `[Q, count]`, ties as above."""
    scores, order = (queries @ candidates.T).sort(dim=1, descending=True, stable=True)
    return scores[:, :count], order[:, :count]


def recall_at(ranks: Tensor, count: int) -> float:
    """Give the share of queries whose right answer is among the first `count`."""
    return (ranks < count).double().mean().item()
