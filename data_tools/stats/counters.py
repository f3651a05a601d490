"""Counters of bounded memory that merge: distributions, most frequent texts, duplicates by hash, bad samples."""

import hashlib
import math
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from siglip_train.data.shards.faults import BadSample

_DISTINCT = 1 << 24
_TEXTS = 200_000
_NAMED = 10_000
# hashes that wait for the next sorting, at least
_PENDING = 1 << 16


def digest(item: bytes) -> int:
    """64 bits that are the same for equal items, in every run."""
    return int.from_bytes(hashlib.blake2b(item, digest_size=8).digest(), "little")


@dataclass
class Distribution:
    """Numbers >= 0, counted by their first three digits: a few thousand bins, whole numbers below 1000 exact."""

    count: int = 0
    total: float = 0
    low: float = math.inf
    high: float = -math.inf
    bins: Counter[float] = field(default_factory=Counter)

    def add(self, value: float) -> None:
        """Count one number."""
        self.count += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)
        self.bins[float(f"{value:.3g}")] += 1

    def merge(self, other: "Distribution") -> None:
        """Add the numbers of another."""
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.bins.update(other.bins)

    @property
    def mean(self) -> float:
        """Of the exact numbers; 0 where there is none."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """The smallest number that at least this share of them does not exceed, to three digits."""
        needed, seen = max(1, math.ceil(share * self.count)), 0
        for value in sorted(self.bins):
            seen += self.bins[value]
            if seen >= needed:
                return min(max(value, self.low), self.high)
        return 0.0


@dataclass
class Frequent:
    """How often texts occur. Exact up to `limit` of them; then the rarer half is forgotten, again and again.

    dropped: occurrences forgotten; while it is 0, all counts are exact, and else they are at least as stated.
    """

    limit: int = _TEXTS
    counts: Counter[str] = field(default_factory=Counter)
    dropped: int = 0

    def add(self, text: str) -> None:
        """Count a text once."""
        self.counts[text] += 1

    def merge(self, other: "Frequent") -> None:
        """Add the texts of another."""
        self.counts.update(other.counts)
        self.dropped += other.dropped
        if len(self.counts) > self.limit:
            kept = Counter(dict(self.top(self.limit // 2)))
            self.dropped += self.counts.total() - kept.total()
            self.counts = kept

    def top(self, number: int) -> list[tuple[str, int]]:
        """The most frequent, equally frequent ones in the order of the alphabet."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:number]


@dataclass
class Distinct:
    """How many items are alike, by 64-bit hashes.

    Above `limit` distinct items only the hashes that end in `level` zero bits are kept: of one item in 2^level every
    occurrence, so that shares stay right on average. The result does not depend on the order of items and merges.
    """

    limit: int = _DISTINCT
    level: int = 0
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    pending: array = field(default_factory=lambda: array("Q"))

    def add(self, item: bytes) -> None:
        """Count one item."""
        self.pending.append(digest(item))

    def merge(self, other: "Distinct") -> None:
        """Add the items of another."""
        other.settle()
        self.level = max(self.level, other.level)
        self.pending.frombytes(np.repeat(other.hashes, other.counts).tobytes())
        # sorting as much as is known already, each time, would take quadratic time
        if len(self.pending) > max(len(self.hashes), _PENDING):
            self.settle()

    def settle(self) -> None:
        """Sort in what waits. To be called before `hashes` and `counts` are read."""
        fresh = np.array(self.pending, dtype=np.uint64)
        hashes, places = np.unique(np.concatenate((self.hashes, fresh)), return_inverse=True)
        counts = np.zeros(len(hashes), dtype=np.int64)
        np.add.at(counts, places, np.concatenate((self.counts, np.ones(len(fresh), dtype=np.int64))))
        kept = self._kept(hashes)
        while kept.sum() > self.limit:
            self.level += 1
            kept = self._kept(hashes)
        self.hashes, self.counts, self.pending = hashes[kept], counts[kept], array("Q")

    def _kept(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return (hashes & np.uint64((1 << self.level) - 1)) == 0

    @property
    def repeated(self) -> int:
        """Items, of those kept, that are the second or a later one of their kind."""
        self.settle()
        return int(self.counts.sum()) - len(self.counts)

    @property
    def repeated_share(self) -> float:
        """Share of items that could go without a loss; 0 where there is none."""
        repeated = self.repeated
        return repeated / (repeated + len(self.counts)) if len(self.counts) else 0.0

    @property
    def most_alike(self) -> int:
        """Occurrences of the most frequent item."""
        self.settle()
        return int(self.counts.max(initial=0))


@dataclass
class BadSamples:
    """Counts of bad samples by cause, and where the first of them are."""

    causes: Counter[str] = field(default_factory=Counter)
    named: list[BadSample] = field(default_factory=list)

    def add(self, bad: BadSample) -> None:
        """Count one."""
        self.causes[bad.cause] += 1
        if len(self.named) < _NAMED:
            self.named.append(bad)

    def merge(self, other: "BadSamples") -> None:
        """Add those of another."""
        self.causes.update(other.causes)
        self.named += other.named[: _NAMED - len(self.named)]
