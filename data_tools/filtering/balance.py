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
weight, so that few groups remain of any number of samples. Their dual is solved by accelerated projected gradient
ascent with restarts: for multipliers l >= 0 of the constraints A q <= 0 the best weights are
q = clip(1 - A^T l, 0, 1), and A q is the gradient.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.filtering.balance_spec import BalanceSpec, Shares
from siglip_train.errors import UserError

_STEPS = 50_000
_CHECK_EVERY = 20
# solved for a little less than eps, so that what is left of the error does not exceed it
_INSIDE = 0.999
_GAP = 1e-7
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
    targets = np.array([moment.target for moment in problem.moments])[:, None]
    off = problem.share - problem.shown * targets
    slack = eps * _INSIDE * problem.shown
    limits = np.concatenate((off - slack, -off - slack))  # [2 J, G]
    scale = np.sqrt(limits**2 @ sizes)
    limits = limits[scale > 0] / scale[scale > 0, None]
    if not len(limits):
        return np.ones(len(sizes))
    step = 1 / np.linalg.norm(limits * np.sqrt(sizes), 2) ** 2
    multipliers = ahead = np.zeros(len(limits))
    momentum = 1.0
    for number in range(_STEPS):
        slope = limits @ (sizes * _weights(limits, ahead))
        new = np.maximum(ahead + step * slope, 0)
        if (new - multipliers) @ (ahead - new) > 0:
            # the pace carries the wrong way: begin anew from here
            momentum = 1.0
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / grown * (new - multipliers)
        multipliers, momentum = new, grown
        if number % _CHECK_EVERY == 0 and _is_solved(problem, multipliers, limits, sizes, eps):
            return _weights(limits, multipliers)
    raise UserError(f"no weights found in {_STEPS} steps that balance the shares to {eps}: use a larger eps")


def _weights(limits: Array, multipliers: Array) -> Array:
    return np.clip(1 - multipliers @ limits, 0, 1)


def _is_solved(
    problem: Moments, multipliers: Array, limits: Array, sizes: NDArray[np.int64], eps: float
) -> bool:
    """Do the weights keep to eps, and is no part of their distance from 1 needless?"""
    weights = _weights(limits, multipliers)
    counts = sizes * weights
    targets = np.array([moment.target for moment in problem.moments])
    excess = np.abs(problem.share @ counts - targets * (problem.shown @ counts)) - eps * (
        problem.shown @ counts
    )
    distance = float(sizes @ (1 - weights) ** 2) / 2
    # between the primal and the dual objective
    gap = abs(float(multipliers @ (limits @ counts)))
    return bool(excess.max() <= 0) and gap <= _GAP * (1 + distance)


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
