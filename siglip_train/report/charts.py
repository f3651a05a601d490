"""Line charts, histograms and bar charts as inline SVG, with values on hover. Pure functions."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from siglip_train.report.numbers import log_ticks, ticks
from siglip_train.report.render import render

WIDTH, HEIGHT = 520, 244
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 12, 36

# a line of more points than pixels only makes the file larger
MOST_POINTS = 400
MOST_HOVER_POINTS = 80
# of a bar chart: the space for names, in pixels and in characters, and for counts
_NAME_WIDTH, _NAME_CHARACTERS, _COUNT_WIDTH = 210, 26, 96

YScale = Literal["linear", "log if wide"]
Point = tuple[float, float]


class Series(NamedTuple):
    """A named line. points: (x, y) in ascending x; a y that is not finite leaves a gap."""

    name: str
    points: Sequence[Point]

    @property
    def finite(self) -> list[Point]:
        """The points that can be drawn."""
        return [point for point in self.points if math.isfinite(point[1])]

    @property
    def hover(self) -> list[Point]:
        """The points that tell their values."""
        return self.finite[:: math.ceil(len(self.finite) / MOST_HOVER_POINTS)]


class Bin(NamedTuple):
    """Numbers of low <= x < high, in the last bin also x = high."""

    low: float
    high: float
    number: int

    @property
    def whole(self) -> float | None:
        """The only whole number inside, where the bin stands over one."""
        return self.low + 0.5 if self.high - self.low == 1 and self.low % 1 == 0.5 else None


class Scale(NamedTuple):
    """A map from values to pixels. is_log: base-10 logarithm first."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Give the pixel of a value."""
        low, high = self._position(self.low), self._position(self.high)
        return self.start + (self._position(value) - low) / (high - low) * (self.end - self.start)

    def _position(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def ticks(self, *, is_whole: bool = False) -> list[float]:
        """Give round values along the scale."""
        if self.is_log:
            return log_ticks(self.low, self.high)
        return ticks(self.low, self.high, is_whole=is_whole)


def line_chart(title: str, series: Sequence[Series], *, y: YScale = "linear", x_name: str = "step") -> Markup:
    """Give a `<figure>` with the chart and its legend; an empty string where there is nothing to draw.

    y "log if wide": logarithmic where all values are positive and span more than two orders of magnitude.
    """
    lines = [Series(line.name, thinned(line.points, MOST_POINTS)) for line in series if line.finite]
    if not lines:
        return Markup()
    xs, ys = zip(*(point for line in series for point in line.finite), strict=True)
    is_log = y == "log if wide" and min(ys) > 0 and max(ys) / min(ys) > 100
    low, high = (min(ys) / 1.3, max(ys) * 1.3) if is_log else _range(min(ys), max(ys), 0.06)
    x_scale = _across(*_range(min(xs), max(xs), 0.0))
    y_scale = Scale(low, high, HEIGHT - BOTTOM, TOP, is_log)
    drawn = [(line, _path(line.points, x_scale, y_scale)) for line in lines]
    note = "log scale" if is_log else ""
    return _chart("line", title, note, x_scale, y_scale, x_name=x_name, lines=drawn)


def histogram(title: str, bins: Sequence[Bin], note: str, unit: str, *, is_log: bool = False) -> Markup:
    """Give a `<figure>` with a bar for each bin, which border on one another."""
    x_scale = _across(bins[0].low, bins[-1].high, is_log=is_log)
    y_scale = Scale(0, max(each.number for each in bins), HEIGHT - BOTTOM, TOP)
    return _chart("bins", title, note, x_scale, y_scale, x_name=unit, bins=bins)


def plain_figure(title: str, text: str) -> Markup:
    """Give a `<figure>` that says in words what needs no drawing."""
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>').format(title, text)


def bar_chart(title: str, rows: Sequence[tuple[str, int]], whole: int, note: str = "") -> Markup:
    """Give a `<figure>` with a bar a row, each with its count and its share of `whole`; "" without rows."""
    if not rows:
        return Markup()
    scale = Scale(0, max(count for _, count in rows), 0, WIDTH - _NAME_WIDTH - _COUNT_WIDTH)
    bars = [(name, _clipped(name), count, max(scale(count), 1)) for name, count in rows]
    return render("bars.html", title=title, note=note, bars=bars, whole=whole, left=_NAME_WIDTH, width=WIDTH)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Give at most about `most` points: of each stretch the lowest and the highest, so spikes survive."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = Series("", stretch).finite or [stretch[0]]
        kept += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _chart(kind: str, title: str, note: str, x: Scale, y: Scale, **values: Any) -> Markup:
    return render(
        "chart.html", kind=kind, title=title, note=note, x=x, y=y, width=WIDTH, height=HEIGHT, **values
    )


def _across(low: float, high: float, *, is_log: bool = False) -> Scale:
    return Scale(low, high, LEFT, WIDTH - RIGHT, is_log)


def _range(low: float, high: float, margin: float) -> tuple[float, float]:
    if low == high:
        margin, high, low = 0.0, high + (abs(high) * 0.1 or 1.0), low - (abs(low) * 0.1 or 1.0)
    extra = (high - low) * margin
    return low - extra, high + extra


def _path(points: Sequence[Point], x_scale: Scale, y_scale: Scale) -> str:
    commands, is_down = [], False
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{'L' if is_down else 'M'}{x_scale(x):.1f} {y_scale(y):.1f}")
        is_down = math.isfinite(y)
    return "".join(commands)


def _clipped(name: str) -> str:
    room = _NAME_CHARACTERS
    for place, character in enumerate(name):
        # Chinese characters, for example, are twice as wide
        room -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if room < 0:
            return name[: max(place - 1, 0)] + "…"
    return name
