"""The bins over a distribution of numbers, and their drawing."""

import math

from markupsafe import Markup

from data_tools.stats.counters import Distribution
from siglip_train.report.charts import Bin, plain_figure
from siglip_train.report.charts import histogram as draw
from siglip_train.report.numbers import round_step, short

_BINS = 40
# a histogram over a wider range than this factor has a logarithmic axis
_WIDE = 50


def histogram(title: str, numbers: Distribution, unit: str, *, is_ratio: bool = False) -> Markup:
    """Give a `<figure>`, of one line where all numbers are equal; an empty string where there is none.

    is_ratio: a logarithmic axis always, on which 1:2 is as far from 1 as 2:1.
    """
    if not numbers.count:
        return Markup()
    if numbers.low == numbers.high:
        return plain_figure(title, f"always {short(numbers.low)} {unit}")
    bins, is_log = binned(numbers, is_ratio=is_ratio)
    low, median, high = (short(value, 3) for value in (numbers.low, numbers.quantile(0.5), numbers.high))
    return draw(title, bins, f"median {median}, {low} to {high}", unit, is_log=is_log)


def binned(numbers: Distribution, *, is_ratio: bool = False) -> tuple[list[Bin], bool]:
    """About forty bins over numbers that are not all equal, and whether they grow by a factor instead of a step."""
    low, high = numbers.low, numbers.high
    is_whole = all(value == int(value) for value in numbers.bins)
    if is_ratio or (low > 0 and high / low > _WIDE):
        edges = [low * (high / low) ** (step / _BINS) for step in range(_BINS)]
        if is_whole and not is_ratio:
            # between 1 and 2 there is nothing to count
            edges = sorted({math.ceil(edge) for edge in edges if edge < high - 1})
        return _filled(numbers, [*edges, high]), True
    step = _bin_width(low, high, is_whole=is_whole)
    # a bar of one whole number stands over that number
    shift = 0.5 if is_whole and step == 1 else 0.0
    first, last = math.floor(low / step), math.floor(high / step) + 1
    return _filled(numbers, [place * step - shift for place in range(first, last + 1)]), False


def _bin_width(low: float, high: float, *, is_whole: bool) -> float:
    # numbers are known to three digits, so that narrower bins would be empty in turns
    known = 10.0 ** (math.floor(math.log10(high)) - 2)
    least = max((high - low) / _BINS, known)
    return 1.0 if is_whole and least <= 1 else round_step(least)


def _filled(numbers: Distribution, edges: list[float]) -> list[Bin]:
    counts = [0] * (len(edges) - 1)
    place = 0
    for value in sorted(numbers.bins):
        # rounding to three digits may have moved a number out of the first or the last bin
        while place < len(counts) - 1 and value >= edges[place + 1]:
            place += 1
        counts[place] += numbers.bins[value]
    return [Bin(*each) for each in zip(edges[:-1], edges[1:], counts, strict=True)]
