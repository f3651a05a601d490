"""Weights that bring the shares of attribute values, overall and with each concept, towards targets.

After the data balancing of Alabdulmohsin et al., "CLIP the Bias: How Useful is Balancing Data in Multimodal Learning?"
(2024), who match first-order statistics (how often an attribute has a value) and second-order ones (how attribute and
concept go together). The problem solved here, for samples i and moments j, is

    minimise  1/2 sum_i (1 - q_i)^2    over 0 <= q_i <= 1
    so that   |sum_i q_i d_ij (s_ij - target_j)| <= eps sum_i q_i d_ij   for every j,

where d_ij is 1 where sample i counts for moment j (it shows the attribute, and the concept where there is one), and
s_ij is 1 where it shows the value of j (shared equally where it shows several values of one attribute). In words:
under the weights q, the share of every value is within eps of its target, among all samples that show the attribute and
among those that show each concept too, while as much data as possible stays, as evenly as possible. One target for
both makes attribute and concept independent.

The constraints are linear in q, so this is a projection onto a convex set. Samples that show the same have the same
weight, so that groups of them are all that is solved for. For multipliers l >= 0 of the constraints A q <= 0 the best
weights are q = clip(1 - A^T l, 0, 1); the dual, concave and piecewise quadratic with gradient A q, is climbed by
projected Newton steps (Bertsekas, "Projected Newton Methods for Optimization Problems with Simple Constraints", 1982).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.filter.balance_spec import BalanceSpec, Shares
from siglip_train.errors import UserError

_STEPS, _HALVINGS = 200, 40
# solved for a little less than eps, so that what is left of the error does not exceed it
_INSIDE = 0.999
_GAP = 1e-7
_RIDGE = 1e-9
# of the climb that the slope promises, the part that a step must make
_ARMIJO = 1e-4
Array = NDArray[np.float64]


class Moment(NamedTuple):
    """A share to be moved: of `value` among the samples that show `attribute`, and `concept` unless that is ""."""

    attribute: str
    value: str
    concept: str
    target: float


class Moments(NamedTuple):
    """J moments of G groups of samples. shown `[J, G]`: does a group count for a moment? share `[J, G]`: of its value.

    left_out: concepts and attributes that no weights but 0 could balance, with the reason.
    """

    moments: list[Moment]
    shown: NDArray[np.bool_]
    share: Array
    left_out: list[str]

    def shares(self, counts: Array) -> Array:
        """`[J]`, for so many samples, or such weight, in each group; nan where nothing shows it."""
        whole = self.shown @ counts
        return np.divide(self.share @ counts, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def group(shows: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """`[n, traits]` to (traits `[G, traits]` of every group, `[n]` the group of each sample, `[G]` sizes)."""
    patterns, groups, sizes = np.unique(shows, axis=0, return_inverse=True, return_counts=True)
    return patterns, groups.reshape(-1), sizes


def moments(spec: BalanceSpec, patterns: NDArray[np.bool_], sizes: NDArray[np.int64]) -> Moments:
    """All moments of a specification; patterns `[G, values + concepts]`. Raises `UserError` for a hopeless target."""
    result = Moments([], np.empty((0, len(sizes)), bool), np.empty((0, len(sizes))), [])
    start, concepts = 0, patterns[:, len(spec.values) :]
    for attribute, traits in spec.attributes.items():
        values = patterns[:, start : start + len(traits)].T  # [V, G]
        start += len(traits)
        shown: NDArray[np.bool_] = np.logical_or.reduce(values)
        share = values / np.maximum(values.sum(axis=0), 1)
        target = spec.targets[attribute] or _present(traits, share, shown, sizes)
        hopeless = _hopeless(target, share[:, shown], spec.eps)
        if hopeless:
            raise UserError(f"{attribute} cannot be balanced: {hopeless}")
        result = _with(result, attribute, "", target, shown, share)
        for number, concept in enumerate(spec.concepts):
            both = shown & concepts[:, number]
            wanted = spec.concept_targets.get(concept, {}).get(attribute, target)
            hopeless = _hopeless(wanted, share[:, both], spec.eps)
            if hopeless:
                result.left_out.append(f"{concept} by {attribute}: {hopeless}")
            else:
                result = _with(result, attribute, concept, wanted, both, share)
    return result


def _present(
    values: dict, share: Array, shown: NDArray[np.bool_], sizes: NDArray[np.int64]
) -> dict[str, float]:
    whole = max(float(shown @ sizes), 1.0)
    return {value: float(row @ (shown * sizes)) / whole for value, row in zip(values, share, strict=True)}


def _hopeless(target: Shares, share: Array, eps: float) -> str:
    """Why no weights give these shares; "" where some may. share: `[V, samples that count]`."""
    if not share.shape[1]:
        return "no sample shows it"
    for (value, wanted), row in zip(target.items(), share, strict=True):
        if row.max() < wanted - eps:
            return f"no sample shows {value}"
        if row.min() > wanted + eps:
            return f"every sample shows {value}"
    return ""


def _with(
    known: Moments, attribute: str, concept: str, target: Shares, shown: NDArray[np.bool_], share: Array
) -> Moments:
    added = [Moment(attribute, value, concept, float(wanted)) for value, wanted in target.items()]
    return Moments(
        known.moments + added,
        np.concatenate((known.shown, np.broadcast_to(shown, share.shape))),
        np.concatenate((known.share, share * shown)),
        known.left_out,
    )


def solve(problem: Moments, sizes: NDArray[np.int64], eps: float) -> Array:
    """`[G]` weights in 0..1 of the groups. Raises `UserError` where they are not found."""
    weights = np.ones(len(sizes))
    # of the others every weight would do, so that they keep theirs
    concerned = problem.shown.any(axis=0)
    counts = sizes[concerned].astype(np.float64)
    shown = problem.shown[:, concerned]
    off = problem.share[:, concerned] - shown * np.array([[moment.target] for moment in problem.moments])
    wide, narrow = eps * shown, eps * _INSIDE * shown
    # the two values of an attribute give the same rows
    _, once = np.unique(np.concatenate((off, -off)), axis=0, return_index=True)
    limits = np.concatenate((off - narrow, -off - narrow))[once]  # [K, groups that show an attribute]
    bounds = np.concatenate((off - wide, -off - wide))[once]
    weights[concerned] = _climb(limits, bounds, counts)
    return weights


def _climb(limits: Array, bounds: Array, counts: Array) -> Array:
    """`[G]` the weights at the top of the dual. limits `[K, G]` are what is solved for, bounds what has to be kept."""
    limits = limits / np.sqrt(np.maximum(limits**2 @ counts, _RIDGE))[:, None]
    multipliers = np.zeros(len(limits))
    for _ in range(_STEPS):
        weights = _weights(limits, multipliers)
        slope = limits @ (counts * weights)
        # between the primal and the dual objective
        gap = abs(float(multipliers @ slope))
        if (bounds @ (counts * weights)).max() <= 0 and gap <= _GAP * (1 + _distance(weights, counts)):
            return weights
        multipliers = _step(limits, counts, multipliers, slope)
    raise UserError(f"no weights found in {_STEPS} steps that balance the shares: use a larger eps")


def _step(limits: Array, counts: Array, multipliers: Array, slope: Array) -> Array:
    """Newton's step among the multipliers that may move, cut back until it climbs."""
    free = (multipliers > 0) | (slope > 0)
    weights = _weights(limits, multipliers)
    inside = (weights > 0) & (weights < 1)
    rows = limits[np.ix_(free, inside)]
    curvature = (rows * counts[inside]) @ rows.T
    # rows that follow from others leave it singular
    curvature[np.diag_indices_from(curvature)] += _RIDGE
    direction = np.zeros(len(multipliers))
    direction[free] = np.linalg.solve(curvature, slope[free])
    height, length = _height(limits, counts, multipliers), 1.0
    for _ in range(_HALVINGS):
        moved = np.maximum(multipliers + length * direction, 0)
        if _height(limits, counts, moved) >= height + _ARMIJO * float(slope @ (moved - multipliers)):
            break
        length /= 2
    return moved


def _height(limits: Array, counts: Array, multipliers: Array) -> float:
    """The dual objective."""
    weights = _weights(limits, multipliers)
    return _distance(weights, counts) + float(multipliers @ (limits @ (counts * weights)))


def _distance(weights: Array, counts: Array) -> float:
    """The primal objective."""
    return float(counts @ (1 - weights) ** 2) / 2


def _weights(limits: Array, multipliers: Array) -> Array:
    return np.clip(1 - multipliers @ limits, 0, 1)


def subsample(
    groups: NDArray[np.int64], weights: Array, digests: NDArray[np.uint64], drawn: Array
) -> NDArray[np.bool_]:
    """`[n]`: which samples stay, of each group the share that its weight says, those with the lowest digests.

    groups `[n]`, weights `[G]`, digests `[n]` hashes of keys. Exact to one sample a group, which nothing can avoid;
    `drawn` `[G]` in 0..1 decides about that one.
    """
    order = np.lexsort((digests, groups))
    sizes = np.bincount(groups, minlength=len(weights))
    number = np.empty(len(groups), dtype=np.int64)
    number[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # weights of 1 but for rounding keep all
    return number < np.floor(sizes * weights + drawn * (weights < 1 - 1e-9) + 1e-9)[groups]
