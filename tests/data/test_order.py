"""Exactly once an epoch, purity, windows, draws with replacement."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from siglip_train.data.order import SourceOrder, sample_generator
from siglip_train.errors import UserError

COUNTS = np.array([7, 0, 3, 11, 5, 1, 8])
TOTAL = int(COUNTS.sum())
EVERY = {(shard, sample) for shard, count in enumerate(COUNTS) for sample in range(count)}


def _order(
    order: str = "shuffled", window: int = 10, seed: int = 0, counts: np.ndarray = COUNTS
) -> SourceOrder:
    return SourceOrder(counts, seed=seed, source=0, window=window, order=order)


def _epoch(order: SourceOrder, epoch: int) -> list[tuple[int, int]]:
    return [order.locate(slot) for slot in range(epoch * TOTAL, (epoch + 1) * TOTAL)]


@pytest.mark.parametrize("window", [1, 10, 20, 1000])
def test_every_sample_once_an_epoch(window: int):
    order = _order(window=window)
    epochs = [_epoch(order, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert len(epoch) == TOTAL
        assert set(epoch) == EVERY
    assert epochs[0] != epochs[1] != epochs[2]


def test_sequential_is_file_order():
    assert _epoch(_order("sequential"), 1) == sorted(EVERY)


@pytest.mark.parametrize("kind", ["shuffled", "resampled", "sequential"])
def test_a_slot_does_not_depend_on_what_was_asked_before(kind: str):
    order = _order(kind)
    expected = [order.locate(slot) for slot in range(4 * TOTAL)]
    for slot in np.random.default_rng(0).integers(4 * TOTAL, size=40).tolist():
        assert pickle.loads(pickle.dumps(_order(kind))).locate(slot) == expected[slot]


def test_the_seed_and_the_source_change_the_order():
    other = SourceOrder(COUNTS, seed=0, source=1, window=10, order="shuffled")
    assert len({tuple(_epoch(each, 0)) for each in (_order(), _order(seed=1), other)}) == 3


def test_windows_hold_whole_shards_mixed_and_are_never_short():
    counts = np.full(20, 50)
    order = _order(window=200, counts=counts)
    first = [order.locate(slot) for slot in range(200)]
    shards = {shard for shard, _ in first}
    assert len(shards) == 4
    # inside the window the shards alternate: no long run of one of them
    runs = sum(a[0] != b[0] for a, b in itertools.pairwise(first))
    assert runs > 120
    assert set(first) == {(shard, sample) for shard in shards for sample in range(50)}
    # 1050 samples in windows of at least 200: the rest joins the last one
    sizes = np.diff([*_order(window=200, counts=np.full(21, 50))._layout(0).starts, 1050])
    assert sizes.tolist() == [200, 200, 200, 200, 250]


def test_resampled_draws_each_sample_equally_often_as_chi_square_says():
    window, draws = 20, 200 * TOTAL
    order = _order("resampled", window=window)
    # one slot of each window, as those of one window are not independent of each other
    drawn = Counter(order.locate(number * window + number % window) for number in range(draws))
    assert set(drawn) == EVERY
    statistic = sum((drawn[sample] - 200) ** 2 / 200 for sample in EVERY)
    # that of 34 degrees of freedom lies between 14 and 65 in 998 of 1,000 cases (Wilson and Hilferty)
    freedom = TOTAL - 1
    low, high = (freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3 for z in (-3.1, 3.1))
    assert low < statistic < high


def test_resampled_knows_no_passes():
    order = _order("resampled", window=20)
    drawn = [order.locate(slot) for slot in range(10 * TOTAL)]
    assert len(set(drawn[:20])) > 10
    for begin in range(0, 10 * TOTAL, TOTAL):
        assert len(set(drawn[begin : begin + TOTAL])) < TOTAL


def test_substitutes_are_of_the_same_epoch_and_far_away():
    order = _order()
    steps = set()
    for seed in range(200):
        slot = TOTAL + seed % TOTAL
        other = order.elsewhere(slot, np.random.default_rng(seed))
        assert other // TOTAL == 1
        distance = abs(other - slot)
        steps.add(min(distance, TOTAL - distance))
    assert min(steps) >= TOTAL // 4
    assert _order(counts=np.array([1])).elsewhere(5, np.random.default_rng(0)) == 5


@pytest.mark.parametrize("options", [{"order": "random"}, {"window": 0}], ids=str)
def test_wrong_options_are_user_errors(options: dict):
    with pytest.raises(UserError):
        _order(**options)


@pytest.mark.parametrize("kind", ["shuffled", "sequential", "resampled"])
def test_the_shards_of_a_range_are_those_its_windows_read(kind: str):
    counts = np.array([4, 0, 7, 2, 6, 1, 9, 3])
    order = _order(kind, counts=counts, window=8)
    whole = [0, 32, 64, 96] if kind != "resampled" else list(range(0, 97, 8))
    read = [{order.locate(slot)[0] for slot in range(begin, end)} for begin, end in itertools.pairwise(whole)]
    for (begin, end), shards in zip(itertools.pairwise(whole), read, strict=True):
        found = order.shards_between(begin, end)
        assert set(found) == shards
        assert len(found) == len(shards)
    for start in range(64):
        for stop in (start + 1, start + 5, start + 40):
            found = order.shards_between(start, stop)
            assert {order.locate(slot)[0] for slot in range(start, stop)} <= set(found)
            # other windows than those of the range are left alone
            assert len(order.shards_between(start, start + 1)) <= 5


def test_substitutes_may_be_kept_close_by():
    order = _order(counts=np.full(50, 10), window=20)
    for seed in range(100):
        other = order.elsewhere(500 + seed, np.random.default_rng(seed), within=20)
        assert 5 <= (other - seed - 500) % 500 < 15


def test_a_sample_draws_from_one_generator_of_its_own_made_at_the_first_draw(monkeypatch: pytest.MonkeyPatch):
    expected = np.random.Generator(np.random.Philox(key=[3, 7]))
    made, make = [], np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda key: made.append(key) or make(key=key))
    rng = sample_generator(3, 7)
    assert made == []
    for draw in (
        lambda source: source.random(),
        lambda source: source.integers(100),
        lambda source: source.uniform(0.2, 1.0),
        lambda source: source.choice(5, p=[0.1, 0.2, 0.3, 0.2, 0.2]),
    ):
        assert draw(rng) == draw(expected)
    assert made == [[3, 7]]
