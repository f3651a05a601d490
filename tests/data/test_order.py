"""Exactly once an epoch, purity, windows, mixtures."""

import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest

from siglip_train.data.order import Mixture, SourceOrder
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


def test_resampled_draws_each_sample_about_equally_often():
    order = _order("resampled", window=20)
    rounds = 2000
    drawn = Counter(order.locate(slot) for slot in range(TOTAL * rounds))
    assert set(drawn) == EVERY
    assert min(drawn.values()) > 0.85 * rounds
    assert max(drawn.values()) < 1.15 * rounds
    window = [order.locate(slot) for slot in range(20)]
    assert len(set(window)) > 10


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


def test_one_source_is_the_identity():
    sources, slots = Mixture([0.3], 8, seed=0).slots(24, 32)
    assert (sources.tolist(), slots.tolist()) == ([0] * 8, list(range(24, 32)))


@pytest.mark.parametrize(
    "weights", [[0.7, 0.3], [1, 1, 1], [0.5, 0.3, 0.15, 0.05], [1.0, 1e-3], [3, 1e-2, 2e-2]]
)
def test_cumulative_counts_stay_within_one_of_the_weights(weights: list[float]):
    size = 32
    mixture = Mixture(weights, size, seed=0)
    seen = Counter()
    for block in range(50):
        begin = block * mixture.block_size
        sources, slots = mixture.slots(begin, begin + mixture.block_size)
        for source, slot in zip(sources.tolist(), slots.tolist(), strict=True):
            # the slots of a source are used in order, none twice, none left out
            assert slot == seen[source]
            seen[source] += 1
        for source, weight in enumerate(weights):
            due = weight / sum(weights) * (begin + mixture.block_size)
            assert abs(seen[source] - due) < 1


def test_a_block_is_a_batch_unless_a_source_gets_less_than_one_sample_of_it():
    assert Mixture([0.7, 0.3], 32, seed=0).block_size == 32
    assert Mixture([1, 1 / 64], 32, seed=0).block_size == 3 * 32


def test_labels_are_shuffled_within_the_batch_and_differ_between_batches():
    mixture = Mixture([1, 1], 64, seed=0)
    first, second = (mixture.slots(start, start + 64)[0].tolist() for start in (0, 64))
    assert first != sorted(first)
    assert first != second


def test_any_part_of_a_batch_is_a_slice_of_it():
    mixture = Mixture([0.6, 0.4], 30, seed=3)
    whole = np.stack(mixture.slots(60, 90))
    copy = pickle.loads(pickle.dumps(mixture))
    parts = [np.stack(copy.slots(start, start + 10)) for start in (60, 70, 80)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_quotas_are_exact_after_a_very_long_run():
    mixture = Mixture([0.1, 0.2, 0.7], 32768, seed=0)
    samples = 32768 * 10**7
    assert mixture.quotas(samples) == [samples // 10, samples // 5, samples * 7 // 10]


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, math.nan], [math.inf]])
def test_weights_must_be_positive(weights: list[float]):
    with pytest.raises(UserError, match="weights"):
        Mixture(weights, 8, seed=0)


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
