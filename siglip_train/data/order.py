"""Which sample comes when: a pure function of (seed, position), so that a run's place in the data is one number.

Position g of the run is row g % N of global batch g // N. Neither ranks nor workers nor micro-batches enter, hence
resuming, and resuming on another number of ranks, is arithmetic.
"""

import bisect
import functools
import math
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from siglip_train.errors import UserError

Order = Literal["shuffled", "sequential", "resampled"]
ORDERS = ("shuffled", "sequential", "resampled")
Ints = NDArray[np.int64]

# one stream of random numbers per purpose
_SHARDS, _WINDOW, LABELS = range(3)
# layouts and permutations kept per source: the windows a batch and its neighbours touch
_CACHED = 8


def generator(seed: int, purpose: int, *path: int) -> np.random.Generator:
    """A generator that depends on its arguments only."""
    return np.random.default_rng([seed, purpose, *path])


class _UntilDrawn:
    """Stands for a generator that is made at the first draw: a plain recipe draws nothing inside most samples."""

    def __init__(self, key: list[int]) -> None:
        self._key = key

    @functools.cached_property
    def _generator(self) -> np.random.Generator:
        # keyed directly: a third of the time of `default_rng`
        return np.random.Generator(np.random.Philox(key=self._key))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


def sample_generator(seed: int, position: int) -> np.random.Generator:
    """The generator of all choices made inside the sample at this position: caption, crop, mirror, substitute."""
    return cast(np.random.Generator, _UntilDrawn([seed, position]))


class _Layout(NamedTuple):
    """One epoch of a source: its shards in reading order and how they are grouped into windows."""

    shards: Ints  # [S]
    ends: Ints  # [S] samples up to and including each shard
    windows: list[int]  # [W + 1] first shard of each window, then S
    starts: list[int]  # [W] samples before each window


class SourceOrder:
    """The endless sequence of one source: slot -> (shard, sample).

    shuffled: shards permuted every epoch, then samples permuted within windows of consecutive permuted shards that
    hold at least `window` samples; every sample once an epoch.
    sequential: file order. resampled: every `window` slots come from shards drawn with replacement, no epochs.
    """

    def __init__(self, counts: Ints, *, seed: int, source: int, window: int, order: Order) -> None:
        if order not in ORDERS:
            raise UserError(f"data.order is {order!r}, but must be one of {', '.join(ORDERS)}")
        if window < 1:
            raise UserError(f"data.shuffle_window is {window}, but must be at least 1")
        self.counts = counts
        self.samples = int(counts.sum())
        self.seed, self.source, self.window, self.order = seed, source, window, order
        self._layout = functools.lru_cache(_CACHED)(self._make_layout)
        self._permutation = functools.lru_cache(_CACHED)(self._make_permutation)
        self._drawn = functools.lru_cache(_CACHED)(self._draw_window)

    def __reduce__(self) -> tuple:
        # the caches do not travel to a worker
        make = functools.partial(
            SourceOrder, seed=self.seed, source=self.source, window=self.window, order=self.order
        )
        return make, (self.counts,)

    def locate(self, slot: int) -> tuple[int, int]:
        """(shard, sample in shard) of a slot."""
        if self.order == "resampled":
            shards, samples = self._drawn(slot // self.window)
            place = slot % self.window
            return int(shards[place]), int(samples[place])
        epoch, place = divmod(slot, self.samples)
        layout = self._layout(epoch)
        if self.order == "shuffled":
            window = bisect.bisect_right(layout.starts, place) - 1
            start = layout.starts[window]
            place = start + int(self._permutation(epoch, window)[place - start])
        row = int(np.searchsorted(layout.ends, place, side="right"))
        shard = int(layout.shards[row])
        return shard, place - int(layout.ends[row] - self.counts[shard])

    def elsewhere(self, slot: int, rng: np.random.Generator, within: int | None = None) -> int:
        """A slot of the same epoch, a quarter to three quarters of it away: hardly in the same batch.

        within: slots to take those shares of instead, where going far would mean to fetch another shard.
        """
        span = min(self.samples, within or self.samples)
        step = span // 4 + int(rng.integers(max(1, span // 2)))
        epoch, place = divmod(slot, self.samples)
        return epoch * self.samples + (place + step) % self.samples

    def shards_between(self, start: int, stop: int) -> list[int]:
        """The shards of the whole windows that the slots start..stop-1 lie in, in reading order, each once."""
        found: list[int] = []
        if self.order == "resampled":
            for window in range(start // self.window, -(-stop // self.window)):
                found += np.unique(self._drawn(window)[0]).tolist()
            return list(dict.fromkeys(found))
        while start < stop:
            epoch, place = divmod(start, self.samples)
            end = min(stop - epoch * self.samples, self.samples)
            layout = self._layout(epoch)
            first = layout.windows[bisect.bisect_right(layout.starts, place) - 1]
            last = layout.windows[bisect.bisect_right(layout.starts, end - 1)]
            found += layout.shards[first:last].tolist()
            start = (epoch + 1) * self.samples
        return [shard for shard in dict.fromkeys(found) if self.counts[shard]]

    def _make_layout(self, epoch: int) -> _Layout:
        shards = np.arange(len(self.counts))
        if self.order == "shuffled":
            shards = generator(self.seed, _SHARDS, self.source, epoch).permutation(len(self.counts))
        ends = np.cumsum(self.counts[shards])
        first, done = [0], 0
        for row, end in enumerate(ends.tolist()):
            # what is left after the last full window joins it, so that no window is short
            if end - done >= self.window and self.samples - end >= self.window:
                first.append(row + 1)
                done = end
        starts = [0, *(int(ends[row - 1]) for row in first[1:])]
        return _Layout(shards, ends, [*first, len(shards)], starts)

    def _make_permutation(self, epoch: int, window: int) -> Ints:
        layout = self._layout(epoch)
        end = int(layout.ends[layout.windows[window + 1] - 1])
        return generator(self.seed, _WINDOW, self.source, epoch, window).permutation(
            end - layout.starts[window]
        )

    def _draw_window(self, window: int) -> tuple[Ints, Ints]:
        """(shards, samples) of `window` slots: equal parts from shards drawn in proportion to their size.

        So every slot holds each sample of the source with the same probability.
        """
        rng = generator(self.seed, _WINDOW, self.source, window)
        draws = math.ceil(self.window * len(self.counts) / self.samples)
        drawn = rng.choice(len(self.counts), size=draws, p=self.counts / self.samples)
        shards = np.sort(np.resize(drawn, self.window))
        starts = np.searchsorted(shards, shards)
        # the n-th slot of a shard takes the n-th of its permuted samples, from the start again after the last
        turn = (np.arange(self.window) - starts) % self.counts[shards]
        samples = np.empty_like(turn)
        for shard in np.unique(drawn):
            mine = shards == shard
            samples[mine] = rng.permutation(int(self.counts[shard]))[turn[mine]]
        mixed = rng.permutation(self.window)
        return shards[mixed], samples[mixed]
