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
        _ranks_of_block(block @ candidates.T, groups, candidate_groups)
        for block, groups in zip(queries.split(rows), query_groups.split(rows), strict=True)
    ]
    return torch.cat(pieces)


def _ranks_of_block(scores: Tensor, query_groups: Tensor, candidate_groups: Tensor) -> Tensor:
    is_right = query_groups[:, None] == candidate_groups[None, :]  # [q, M]
    # max returns the first of equal maxima
    best, place = scores.masked_fill(~is_right, -torch.inf).max(dim=1, keepdim=True)  # [q, 1]
    index = torch.arange(scores.shape[1], device=scores.device)
    is_before = (scores > best) | ((scores == best) & (index < place))
    return is_before.sum(dim=1)


def top(queries: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Give the best candidates of each query: scores and indices, both `[Q, count]`, ties as above."""
    scores, order = (queries @ candidates.T).sort(dim=1, descending=True, stable=True)
    return scores[:, :count], order[:, :count]


def recall_at(ranks: Tensor, count: int) -> float:
    """Give the share of queries whose right answer is among the first `count`."""
    return (ranks < count).double().mean().item()
