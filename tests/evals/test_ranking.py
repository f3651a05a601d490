import numpy as np
import pytest
import torch

from siglip_train.evals import ranking
from siglip_train.evals.ranking import best_ranks, best_ranks_in_sets, recall_at, top


def plain_ranks(queries, candidates, query_groups, candidate_groups):
    """Restate it one query at a time: sort, then walk down to the first right candidate."""
    result = []
    for query, group in zip(queries, query_groups, strict=True):
        scores = candidates @ query
        order = sorted(range(len(candidates)), key=lambda index: (-scores[index], index))
        right = [place for place, index in enumerate(order) if candidate_groups[index] == group]
        result.append(right[0] if right else len(candidates))
    return result


@pytest.mark.parametrize("scores_at_a_time", [1, 50, 1 << 24])
def test_equals_a_plain_walk_down_the_sorted_list(monkeypatch, scores_at_a_time):
    monkeypatch.setattr(ranking, "SCORES_AT_A_TIME", scores_at_a_time)
    random = np.random.default_rng(0)
    # small integers, so that ties are frequent and exact
    queries, candidates = random.integers(-2, 3, (37, 3)), random.integers(-2, 3, (23, 3))
    query_groups, candidate_groups = random.integers(0, 9, 37), random.integers(0, 7, 23)
    expected = plain_ranks(queries, candidates, query_groups, candidate_groups)
    ranks = best_ranks(
        *(torch.from_numpy(part).double() for part in (queries, candidates)),
        *(torch.from_numpy(part) for part in (query_groups, candidate_groups)),
    )
    assert ranks.tolist() == expected
    assert 23 in expected, "some query must be without a right candidate"


def test_of_equal_scores_the_lower_index_comes_first():
    ones = torch.ones(3, 1)
    assert best_ranks(ones, ones, torch.arange(3), torch.arange(3)).tolist() == [0, 1, 2]
    scores, order = top(torch.ones(1, 1), torch.tensor([[1.0], [2.0], [1.0], [2.0]]), 3)
    assert order.tolist() == [[1, 3, 0]]
    assert scores.tolist() == [[2.0, 2.0, 1.0]]


def test_recall_counts_ranks_below_the_cut():
    assert recall_at(torch.tensor([0, 1, 4, 5]), 5) == 0.75


def test_sets_of_right_candidates_equal_groups_and_an_empty_set_ranks_last():
    random = np.random.default_rng(2)
    queries, candidates = (torch.from_numpy(random.integers(-2, 3, (count, 3))).double() for count in (30, 9))
    groups = torch.from_numpy(random.integers(0, 3, 30))
    candidate_groups = torch.arange(9) // 3
    targets = groups[:, None] * 3 + torch.arange(3)
    expected = best_ranks(queries, candidates, groups, candidate_groups)
    assert best_ranks_in_sets(queries, candidates, targets).equal(expected)
    targets[:, 1:] = -1
    targets[0, 0] = -1
    single = best_ranks(queries, candidates, groups * 3, torch.arange(9))
    assert best_ranks_in_sets(queries, candidates, targets).tolist() == [9, *single[1:].tolist()]
