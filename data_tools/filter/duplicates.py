"""Which samples repeat an earlier one: equal digests of texts, and fingerprints of images that are near.

Pairs of hashes at a distance of at most r bits are found exactly, without comparing all with all: 64 bits are cut
into m > r blocks, and two such hashes agree in at least m - r of them. So every choice of m - r blocks is sorted, and
only what agrees there is compared (Manku, Jain, Das Sarma, "Detecting Near-Duplicates for Web Crawling", 2007).
"""

from collections.abc import Iterator
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from data_tools.filter.fingerprint import COLOUR_TOLERANCE

_BITS = 64
_MOST_BLOCKS = 12
Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


def repeated(digests: NDArray[np.uint64], most: int = 1) -> NDArray[np.int64]:
    """`[n]`: for each item beyond the first `most` of its kind, the place of the first of them; else -1."""
    _, first, kind, counts = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(kind, kind="stable")
    number = np.empty(len(digests), dtype=np.int64)
    # of an item among those of its kind, in file order
    number[order] = np.arange(len(digests)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.where(number >= most, first[kind], -1)


def near_duplicates(
    hashes: NDArray[np.uint64], colours: NDArray[np.uint8], bits: int, tolerance: int = COLOUR_TOLERANCE
) -> NDArray[np.int64]:
    """`[n]`: the place of an earlier image that stays and is near, -1 for those that stay.

    hashes `[n]`, colours `[n, C]`. Near are at most `bits` different bits, and no colour further than `tolerance`.
    Chains do not join: what is dropped is near to something that stays.
    """
    if not len(hashes):
        return np.empty(0, dtype=np.int64)
    codes = np.concatenate((hashes[:, None].view(np.uint8), colours), axis=1)  # [n, 8 + C]
    whole = np.ascontiguousarray(codes).view(np.dtype((np.void, codes.shape[1]))).ravel()
    _, first, kind = np.unique(whole, return_index=True, return_inverse=True)
    # in file order from here on, so that a smaller number is an earlier image
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    first, kind = first[order], rank[kind]
    near = _greedy(_close(hashes[first], colours[first], bits, tolerance), len(first))
    origin = first[np.where(near >= 0, near, np.arange(len(first)))][kind]
    return np.where(origin == np.arange(len(hashes)), -1, origin)


def _greedy(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`[count]`: in order, each goes (to the first it is near to) unless all that it is near to have gone."""
    near = np.full(count, -1, dtype=np.int64)
    for later, earlier in pairs.tolist():
        if near[later] < 0 and near[earlier] < 0:
            near[later] = earlier
    return near


def _close(
    hashes: NDArray[np.uint64], colours: NDArray[np.uint8], bits: int, tolerance: int
) -> NDArray[np.int64]:
    """`[pairs, 2]` (later, earlier), in order."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for one, other in near_pairs(hashes, bits):
        apart = np.abs(colours[one].astype(np.int16) - colours[other])
        alike = apart.max(axis=1, initial=0) <= tolerance
        pair = np.stack((one[alike], other[alike]), axis=1)
        found.append(np.sort(pair, axis=1)[:, ::-1])
    return np.unique(np.concatenate(found), axis=0)


def near_pairs(hashes: NDArray[np.uint64], bits: int) -> Iterator[Pairs]:
    """Every pair of places whose hashes differ in at most `bits` bits, in parts; a pair may come several times."""
    blocks = np.array_split(np.arange(_BITS, dtype=np.uint64), _block_count(len(hashes), bits))
    for chosen in combinations(blocks, len(blocks) - bits):
        mask = np.bitwise_or.reduce(np.uint64(1) << np.concatenate(chosen))
        for one, other in _equal_pairs(hashes & mask):
            close = np.bitwise_count(hashes[one] ^ hashes[other]) <= bits
            if close.any():
                yield one[close], other[close]


def _block_count(count: int, bits: int) -> int:
    """Few blocks mean few choices, many mean that fewer hashes agree by chance: the least work for so many hashes."""

    def work(blocks: int) -> float:
        agreeing = count / 2 ** (_BITS * (blocks - bits) / blocks)
        return comb(blocks, bits) * (1 + agreeing)

    return min(range(bits + 1, bits + 1 + _MOST_BLOCKS), key=work)


def _equal_pairs(keys: NDArray[np.uint64]) -> Iterator[Pairs]:
    """Every pair of places with equal keys, in parts of at most one pair for each place."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    ends = np.searchsorted(ordered, ordered, side="right")
    places = np.arange(len(keys))
    distance = 1
    while len(places := places[ends[places] > places + distance]):
        yield order[places], order[places + distance]
        distance += 1
