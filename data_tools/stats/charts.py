"""Histograms and bar charts as inline SVG: bins, round ticks, values on hover. Pure functions."""

import math
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from data_tools.stats.counters import Distribution

WIDTH, HEIGHT = 520, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 10, 38
_BINS = 40
# a histogram over a wider range than this factor has a logarithmic axis
_WIDE = 50
_ROW, _NAME_WIDTH, _COUNT_WIDTH, _NAME_CHARACTERS = 22, 210, 96, 26


class Bin(NamedTuple):
    """Numbers of low <= x < high, in the last bin also x = high."""

    low: float
    high: float
    number: int


def histogram(title: str, numbers: Distribution, unit: str, *, is_ratio: bool = False) -> str:
    """Give a `<figure>`, of one line where all numbers are equal; an empty string where there is none.

    is_ratio: a logarithmic axis always, on which 1:2 is as far from 1 as 2:1.
    """
    if not numbers.count:
        return ""
    if numbers.low == numbers.high:
        always = f"always {short(numbers.low)} {escape(unit)}"
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{always}</figure>'
    bins, is_log = binned(numbers, is_ratio=is_ratio)
    low, high = bins[0].low, bins[-1].high
    most = max(each.number for each in bins)

    def across(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(count: float) -> float:
        return HEIGHT - BOTTOM - count / most * (HEIGHT - BOTTOM - TOP)

    bars = "".join(
        f'<rect x="{across(each.low):.1f}" y="{up(each.number):.1f}" '
        f'width="{max(across(each.high) - across(each.low) - 0.8, 0.6):.1f}" '
        f'height="{HEIGHT - BOTTOM - up(each.number):.1f}">'
        f"<title>{_span(each)}: {each.number:,}</title></rect>"
        for each in bins
        if each.number
    )
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{up(count):.1f}" y2="{up(count):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{up(count) + 4:.1f}" text-anchor="end">{short(count)}</text>'
        for count in ticks(0, most, 4, is_whole=True)
    )
    marks = "".join(
        f'<line class="tick" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{floor}" y2="{floor + 4}"/>'
        f'<text x="{across(value):.1f}" y="{floor + 17}" text-anchor="middle">{short(value)}</text>'
        for value in (log_ticks(low, high) if is_log else ticks(low, high, is_whole=_is_one_number(bins[0])))
    )
    return _figure(
        title,
        f"median {short(numbers.quantile(0.5))}, {short(numbers.low)} to {short(numbers.high)}",
        f'{grid}{bars}<line class="axis" x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>{marks}'
        f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(unit)}</text>',
        HEIGHT,
    )


def bar_chart(title: str, rows: Sequence[tuple[str, int]], whole: int, note: str = "") -> str:
    """Give a `<figure>` with a bar a row, each with its count and its share of `whole`; "" without rows."""
    if not rows:
        return ""
    most = max(count for _, count in rows)
    room = WIDTH - _NAME_WIDTH - _COUNT_WIDTH
    bars = "".join(
        f'<text class="name" x="{_NAME_WIDTH - 8}" y="{place * _ROW + 15}" text-anchor="end">'
        f"{escape(_clipped(name))}<title>{escape(name)}</title></text>"
        f'<rect x="{_NAME_WIDTH}" y="{place * _ROW + 3}" width="{max(count / most * room, 1):.1f}" height="{_ROW - 6}">'
        f"<title>{escape(name)}: {count:,}</title></rect>"
        f'<text x="{_NAME_WIDTH + max(count / most * room, 1) + 6:.1f}" y="{place * _ROW + 15}">'
        f"{short(count)} · {percent(count, whole)}</text>"
        for place, (name, count) in enumerate(rows)
    )
    return _figure(title, note, bars, len(rows) * _ROW + 4)


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
    return 1.0 if is_whole and least <= 1 else _round_step(least)


def _filled(numbers: Distribution, edges: list[float]) -> list[Bin]:
    counts = [0] * (len(edges) - 1)
    place = 0
    for value in sorted(numbers.bins):
        # rounding to three digits may have moved a number out of the first or the last bin
        while place < len(counts) - 1 and value >= edges[place + 1]:
            place += 1
        counts[place] += numbers.bins[value]
    return [Bin(*each) for each in zip(edges[:-1], edges[1:], counts, strict=True)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def ticks(low: float, high: float, count: int = 6, *, is_whole: bool = False) -> list[float]:
    """Give at most about `count` round numbers (1, 2, 5 times a power of ten) within low..high."""
    step = _round_step((high - low) / count)
    step = max(step, 1.0) if is_whole else step
    return [
        round(place * step, 12)
        for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Give 1, 2, 5 times the powers of ten within low..high, fewer on a long axis and more on a short one."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [
            round(factor * 10.0**power, 12)
            for power in powers
            for factor in factors
            if low * 0.999 <= factor * 10.0**power <= high * 1.001
        ]
        if len(found) <= 9:
            break
    return found if len(found) > 2 else ticks(low, high)


def short(value: float) -> str:
    """Give a number in few characters: 12.5k, 0.031, 7."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def percent(count: float, whole: float) -> str:
    """Give a share in per cent."""
    return f"{100 * count / whole:.3g} %" if whole else "–"


def _span(each: Bin) -> str:
    return short(each.low + 0.5) if _is_one_number(each) else f"{short(each.low)} to {short(each.high)}"


def _is_one_number(each: Bin) -> bool:
    return each.high - each.low == 1 and each.low % 1 == 0.5


def _clipped(name: str) -> str:
    room = _NAME_CHARACTERS
    for place, character in enumerate(name):
        # Chinese characters, for example, are twice as wide
        room -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if room < 0:
            return name[: max(place - 1, 0)] + "…"
    return name


def _figure(title: str, note: str, content: str, height: int) -> str:
    small = f" <small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{small}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{content}</svg></figure>'
    )
