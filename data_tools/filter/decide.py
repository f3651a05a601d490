"""Decides which samples stay: first by rules, then without duplicates, then by the balance of what is left."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.filter.balance import Array, Moments, group, moments, solve, subsample
from data_tools.filter.balance_spec import BalanceSpec
from data_tools.filter.duplicates import near_duplicates, repeated
from data_tools.filter.look import Seen
from data_tools.stats.counters import digest

BROKEN, DEDUP_IMAGES, DEDUP_TEXTS, BALANCE = "broken", "dedup-images", "dedup-texts", "balance"


class Joint(NamedTuple):
    """What is decided over all samples. image_bits, text_repeats: None = not wanted. weigh: keep, with a weight."""

    image_bits: int | None = None
    text_repeats: int | None = None
    weigh: bool = False


@dataclass
class Verdict:
    """N samples of all shards, in order.

    first: `[N]` number in `names` of the first rule that drops each, -1 = it stays. each: how many samples each rule
    drops, whatever the others do. origin: `[N]` the sample that a repeat repeats, -1. weights: `[N]`, or None.
    """

    names: list[str]
    first: NDArray[np.int64]
    each: list[int]
    origin: NDArray[np.int64]
    weights: Array | None = None
    balance: dict[str, Any] = field(default_factory=dict)

    @property
    def stays(self) -> NDArray[np.bool_]:
        """`[N]`."""
        return self.first < 0

    def drop(self, name: str, dropped: NDArray[np.bool_]) -> None:
        """Count one more rule, which looked only at what had stayed."""
        self.first[dropped & self.stays] = len(self.names)
        self.names.append(name)
        self.each.append(int(dropped.sum()))


def decide(parts: list[Seen], rules: list[str], joint: Joint, spec: BalanceSpec | None) -> Verdict:
    """The verdict over the samples of all shards. Raises `UserError` for a balance that cannot be."""
    failed = np.concatenate([np.column_stack((part.broken, part.failed)) for part in parts])
    first = np.where(failed.any(axis=1), failed.argmax(axis=1), -1)
    verdict = Verdict([BROKEN, *rules], first, failed.sum(axis=0).tolist(), np.full(len(first), -1))
    if joint.image_bits is not None:
        rows = np.flatnonzero(verdict.stays)
        hashes, colours = _column(parts, "hashes")[rows], _column(parts, "colours")[rows]
        _drop_repeats(verdict, DEDUP_IMAGES, rows, near_duplicates(hashes, colours, joint.image_bits))
    if joint.text_repeats is not None:
        rows = np.flatnonzero(verdict.stays & _column(parts, "has_text"))
        digests = _column(parts, "texts")[rows]
        _drop_repeats(verdict, DEDUP_TEXTS, rows, repeated(digests, joint.text_repeats))
    if spec is not None:
        _balance(verdict, _column(parts, "shows"), _column(parts, "digests"), spec, weigh=joint.weigh)
    return verdict


def _column(parts: Iterable[Seen], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(part, name) for part in parts])


def _drop_repeats(verdict: Verdict, name: str, rows: NDArray[np.int64], origin: NDArray[np.int64]) -> None:
    repeats = origin >= 0
    verdict.origin[rows[repeats]] = rows[origin[repeats]]
    dropped = np.zeros(len(verdict.first), dtype=bool)
    dropped[rows[repeats]] = True
    verdict.drop(name, dropped)


def _balance(
    verdict: Verdict, shows: NDArray[np.bool_], digests: NDArray[np.uint64], spec: BalanceSpec, *, weigh: bool
) -> None:
    rows = np.flatnonzero(verdict.stays)
    patterns, groups, sizes = group(shows[rows])
    problem = moments(spec, patterns, sizes)
    weights = solve(problem, sizes, spec.eps)
    if weigh:
        verdict.weights = np.zeros(len(verdict.first))
        verdict.weights[rows] = weights[groups]
        after = sizes * weights
    else:
        # the last sample of a group stays or goes by what the group shows, so that runs agree
        drawn = np.array([digest(np.packbits(pattern).tobytes()) / 2**64 for pattern in patterns])
        kept = subsample(groups, weights, digests[rows], drawn)
        dropped = np.zeros(len(verdict.first), dtype=bool)
        dropped[rows[~kept]] = True
        verdict.drop(BALANCE, dropped)
        after = np.bincount(groups[kept], minlength=len(sizes)).astype(np.float64)
    verdict.balance = _table(problem, sizes.astype(np.float64), sizes * weights, after)


def _table(problem: Moments, before: Array, wanted: Array, after: Array) -> dict[str, Any]:
    """The shares before and after, and how many samples, or how much weight, show the attribute (and concept)."""
    shares = [problem.shares(counts) for counts in (before, wanted, after)]
    shown = [problem.shown @ counts for counts in (before, after)]
    rows = [
        {
            **moment._asdict(),
            **{name: _rounded(each[place]) for name, each in zip(("before", "solved", "after"), shares, strict=True)},
            "samples_before": int(shown[0][place]),
            "samples_after": round(float(shown[1][place]), 1),
        }
        for place, moment in enumerate(problem.moments)
    ]  # fmt: skip
    kept = round(float(after.sum()), 1)
    return {"kept": kept, "of": int(before.sum()), "shares": rows, "left_out": problem.left_out}


def _rounded(share: float) -> float | None:
    return None if np.isnan(share) else round(float(share), 6)
