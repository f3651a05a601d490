"""Mixtures of sources: counts by weight, stages, any part of a batch, sizes that must fit."""

import math
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from siglip_train.data.mixture import Mixture, Stage, StageConfig, stages_of
from siglip_train.errors import UserError


def _mixture(weights: list[float], size: int, *later: Stage, seed: int = 0) -> Mixture:
    return Mixture([Stage(0, weights), *later], size, seed)


def _walk(mixture: Mixture, samples: int) -> Iterator[tuple[int, Counter[int]]]:
    """Batch by batch: its end and how much of each source came, having checked that slots come in order."""
    seen: Counter[int] = Counter()
    size = mixture.global_batch_size
    for begin in range(0, samples, size):
        sources, slots = mixture.slots(begin, begin + size)
        assert len(sources) == size
        for source, slot in zip(sources.tolist(), slots.tolist(), strict=True):
            # the slots of a source are used in order, none twice, none left out
            assert slot == seen[source]
            seen[source] += 1
        yield begin + size, seen


def test_one_source_is_the_identity():
    sources, slots = _mixture([0.3], 8).slots(24, 32)
    assert (sources.tolist(), slots.tolist()) == ([0] * 8, list(range(24, 32)))


@pytest.mark.parametrize(
    "weights", [[0.7, 0.3], [1, 1, 1], [0.5, 0.3, 0.15, 0.05], [1.0, 1e-3], [3, 1e-2, 2e-2], [1, 0, 2]]
)
def test_cumulative_counts_stay_within_one_of_the_weights(weights: list[float]):
    rarest = min(weight for weight in weights if weight) / sum(weights)
    block = math.ceil(1 / (32 * rarest)) * 32
    mixture = _mixture(weights, 32)
    for end, seen in _walk(mixture, 50 * block):
        assert mixture.taken(end) == [seen[source] for source in range(len(weights))]
        if end % block == 0:
            for source, weight in enumerate(weights):
                assert abs(seen[source] - weight / sum(weights) * end) < 1


def test_a_batch_has_its_share_of_every_source_that_gets_a_sample_of_it():
    mixture = _mixture([0.7, 0.3], 32)
    counts = [mixture.slots(begin, begin + 32)[0].tolist().count(1) for begin in range(0, 3200, 32)]
    assert set(counts) == {9, 10}
    assert sum(counts) == 960


def test_labels_are_shuffled_within_the_batch_and_differ_between_batches():
    mixture = _mixture([1, 1], 64)
    first, second = (mixture.slots(start, start + 64)[0].tolist() for start in (0, 64))
    assert first != sorted(first)
    assert first != second


def test_any_part_of_a_batch_is_a_slice_of_it():
    mixture = _mixture([0.6, 0.4], 30, Stage(50, [1, 9]), seed=3)
    for begin in (30, 60):
        whole = np.stack(mixture.slots(begin, begin + 30))
        copy = pickle.loads(pickle.dumps(mixture))
        parts = [np.stack(copy.slots(start, start + 10)) for start in range(begin, begin + 30, 10)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_counts_are_exact_after_a_very_long_run():
    mixture = _mixture([0.1, 0.2, 0.7], 32768)
    samples = 32768 * 10**7
    assert mixture.taken(samples) == [samples // 10, samples // 5, samples * 7 // 10]


# weights of three sources and the sample counts at which they begin; stages shorter than a block of theirs among them
STAGES = {
    "plain": [Stage(0, [8, 1, 1]), Stage(640, [1, 1, 2]), Stage(1280, [0, 1, 0])],
    "off the batches": [Stage(0, [0.5, 0.5, 0]), Stage(333, [0.2, 0.3, 0.5]), Stage(1001, [1, 2, 3])],
    "rare": [Stage(0, [100, 1, 2]), Stage(480, [1, 90, 0.5]), Stage(1600, [1, 1, 0.01]), Stage(1700, [0, 0, 1])],
    "short": [Stage(0, [1000, 1, 1]), Stage(32, [1, 1000, 1]), Stage(64, [1, 1, 1000]), Stage(1024, [1, 1, 1])],
}  # fmt: skip


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_stages_keep_their_shares_and_every_source_goes_on_where_it_was(stages: list[Stage]):
    size, total = 32, 4096
    mixture = Mixture(stages, size, seed=1)
    counts = {0: Counter()}
    for end, seen in _walk(mixture, total):
        counts[end] = Counter(seen)
        assert mixture.taken(end) == [seen[source] for source in range(3)]
    begins = [math.ceil(stage.from_sample / size) * size for stage in stages]
    for stage, (begin, end) in zip(stages, pairwise([*begins, total]), strict=True):
        for source, weight in enumerate(stage.weights):
            share = weight / sum(stage.weights)
            for now in range(begin, end + 1, size):
                got = counts[now][source] - counts[begin][source]
                assert abs(got - share * (now - begin)) <= size
            # at the end of the stage as exact as at the end of a block
            assert abs(got - share * (end - begin)) < 1 or end == total


def test_a_stage_that_is_still_to_come_changes_nothing_before():
    plain, staged = _mixture([3, 1], 32), _mixture([3, 1], 32, Stage(640, [1, 3]))
    for begin in range(0, 640, 32):
        np.testing.assert_array_equal(plain.slots(begin, begin + 32), staged.slots(begin, begin + 32))
    assert staged.slots(640, 672)[0].tolist().count(1) == 24


def test_per_batch_is_the_most_that_a_stage_takes():
    assert _mixture([1, 63], 32).per_batch() == [1, 32]
    assert _mixture([1, 1], 32, Stage(64, [0, 1])).per_batch() == [16, 32]


@pytest.mark.parametrize(
    ("weights", "later", "message"),
    [
        ({"a": 1, "b": -1}, [], r"data\.sources\.\*\.weight: the weights are .*none below 0"),
        ({"a": math.nan}, [], r"data\.sources.*must be finite"),
        ({"a": math.inf}, [], r"data\.sources.*must be finite"),
        ({"a": 0.0}, [], r"data\.sources.*not all 0"),
        ({"a": 1, "b": 0}, [], "source b has no weight from beginning to end"),
        ({"a": 1}, [(5, {"c": 1.0})], r"data\.stages\[0\]: there is no source c \(there are: a\)"),
        ({"a": 1}, [(5, {"a": 0.0})], r"data\.stages\[0\]\.weights: .*not all 0"),
        ({"a": 1}, [(5, {})], r"data\.stages\[0\]\.weights: .*not all 0"),
        ({"a": 1}, [(5, {"a": -0.5})], r"data\.stages\[0\]\.weights: .*none below 0"),
        ({"a": 1}, [(0, {"a": 1.0})], r"data\.stages\[0\]: from_sample is 0, but must be above 0"),
        ({"a": 1}, [(9, {"a": 1.0}), (5, {"a": 1.0})], r"data\.stages\[1\]: from_sample is 5, .* above 9"),
    ],
)  # fmt: skip
def test_wrong_weights_and_stages_are_one_line(
    weights: dict[str, float], later: list[tuple[int, dict[str, float]]], message: str
):
    with pytest.raises(UserError, match=message) as caught:
        stages_of(weights, [StageConfig(*stage) for stage in later])
    assert "\n" not in str(caught.value)


def test_weights_not_named_in_a_stage_are_0_and_a_source_may_come_later():
    stages = stages_of({"a": 1, "b": 0}, [StageConfig(7, {"b": 0.5})])
    assert stages == [Stage(0, [1, 0]), Stage(7, [0, 0.5])]


def test_a_stage_without_a_batch_is_an_error():
    with pytest.raises(UserError, match="from sample 10 ends before its first global batch of 32"):
        _mixture([1, 1], 32, Stage(10, [1, 2]), Stage(20, [2, 1]))
