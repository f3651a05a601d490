"""Percentile intervals against a plain resampling, and how often they hold the truth."""

import numpy as np
import pytest
import torch

from siglip_train.evals import bootstrap
from siglip_train.evals.bootstrap import Share, confidence_intervals


def test_equals_a_plain_resampling():
    random = np.random.default_rng(0)
    trials = random.integers(1, 4, (60, 2))
    hits = np.minimum(random.integers(0, 3, (60, 2)), trials)
    draws = torch.randint(60, (400, 60), generator=torch.Generator().manual_seed(0)).numpy()
    values = [(hits[rows].sum(axis=0) / trials[rows].sum(axis=0)).mean() for rows in draws]
    expected = dict(zip(("acc1_low", "acc1_high"), np.quantile(values, [0.025, 0.975]), strict=True))
    share = Share(torch.from_numpy(hits), torch.from_numpy(trials))
    assert confidence_intervals({"acc1": share}, 400) == pytest.approx(expected, abs=1e-12)


def test_neither_memory_nor_other_metrics_change_it(monkeypatch):
    hits = torch.arange(50) % 3 == 0
    share = Share(hits, torch.ones(50))
    alone = confidence_intervals({"acc1": share}, 64)
    monkeypatch.setattr(bootstrap, "_WEIGHTS_AT_A_TIME", 50 * 7)
    both = confidence_intervals({"acc5": Share(~hits, torch.ones(50)), "acc1": share}, 64)
    assert {name: both[name] for name in alone} == alone


def test_a_part_that_no_drawn_image_has_is_left_out():
    hits = torch.tensor([[1, 0], [1, 0], [1, 1]])
    trials = torch.tensor([[1, 0], [1, 0], [1, 1]])
    assert confidence_intervals({"r": Share(hits, trials)}, 50) == {"r_low": 1.0, "r_high": 1.0}


def test_the_interval_is_that_of_the_binomial():
    # 400 images at 30 %: the standard error is 0.0229
    hits = (torch.arange(400) % 10) < 3
    ends = confidence_intervals({"acc1": Share(hits, torch.ones(400))}, 2000)
    assert ends["acc1_low"] == pytest.approx(0.3 - 1.96 * 0.0229, abs=0.005)
    assert ends["acc1_high"] == pytest.approx(0.3 + 1.96 * 0.0229, abs=0.005)
