"""Line charts as inline SVG: scales, ticks, grid, one line a series, values on hover. Pure functions."""

import math
from collections.abc import Sequence
from html import escape
from typing import Literal, NamedTuple

WIDTH, HEIGHT = 520, 244
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 36

# a line of more points than pixels only makes the file larger
MOST_POINTS = 400
MOST_HOVER_POINTS = 80

YScale = Literal["linear", "log if wide"]


class Series(NamedTuple):
    """A named line. points: (x, y) in ascending x; a y that is not finite leaves a gap."""

    name: str
    points: Sequence[tuple[float, float]]


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


def line_chart(title: str, series: Sequence[Series], *, y: YScale = "linear", x_name: str = "step") -> str:
    """Give an `<figure>` with the chart and its legend; an empty string where there is nothing to draw.

    y "log if wide": logarithmic where all values are positive and span more than two orders of magnitude.
    """
    finite = [
        Series(line.name, kept)
        for line in series
        if (kept := [p for p in line.points if math.isfinite(p[1])])
    ]
    if not finite:
        return ""
    x_scale, y_scale = _scales([point for line in finite for point in line.points], y)
    # gaps are drawn from all points, so only lines without any finite value are dropped
    names = {line.name for line in finite}
    lines = [
        _line(index, Series(line.name, thinned(line.points, MOST_POINTS)), x_scale, y_scale, x_name)
        for index, line in enumerate(line for line in series if line.name in names)
    ]
    legend = "".join(
        f'<span><i class="c{index % 8}"></i>{escape(line.name)} <b>{short(line.points[-1][1])}</b></span>'
        for index, line in enumerate(finite)
    )
    log_note = " <small>log scale</small>" if y_scale.is_log else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{log_note}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_axes(x_scale, y_scale, x_name)}{''.join(lines)}</svg>"
        f'<div class="legend">{legend}</div></figure>'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Give about `count` round values (1, 2, 5 times a power of ten) within low..high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Give the powers of ten within low..high, at most about six."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, (last - first) // 5)
    return [10.0**power for power in range(first, last + 1, stride)]


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Give at most about `most` points: of each stretch the lowest and the highest, so spikes survive."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [index for index in stretch if math.isfinite(points[index][1])]
        ends = (
            {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
            if finite
            else {start}
        )
        kept += [points[index] for index in sorted(ends)]
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def short(value: float) -> str:
    """Give a number in at most about six characters: 12.5k, 0.0312, 1e-05."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.2g}"


def _scales(points: Sequence[tuple[float, float]], y: YScale) -> tuple[Scale, Scale]:
    xs, ys = zip(*points, strict=True)
    is_log = y == "log if wide" and min(ys) > 0 and max(ys) / min(ys) > 100
    x_low, x_high = _room(min(xs), max(xs), 0.0)
    y_low, y_high = (min(ys) / 1.3, max(ys) * 1.3) if is_log else _room(min(ys), max(ys), 0.06)
    return (
        Scale(x_low, x_high, LEFT, WIDTH - RIGHT),
        Scale(y_low, y_high, HEIGHT - BOTTOM, TOP, is_log),
    )


def _room(low: float, high: float, margin: float) -> tuple[float, float]:
    if low == high:
        half = abs(low) * 0.1 or 1.0
        return low - half, high + half
    extra = (high - low) * margin
    return low - extra, high + extra


def _axes(x_scale: Scale, y_scale: Scale, x_name: str) -> str:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    y_ticks = (log_ticks if y_scale.is_log else ticks)(y_scale.low, y_scale.high)
    parts = []
    for value in y_ticks:
        y = y_scale(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in ticks(x_scale.low, x_scale.high):
        x = x_scale(value)
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<text class="name" x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    return "".join(parts)


def _line(index: int, line: Series, x_scale: Scale, y_scale: Scale, x_name: str) -> str:
    drawn = _path(line.points, x_scale, y_scale)
    finite = [point for point in line.points if math.isfinite(point[1])]
    stride = math.ceil(len(finite) / MOST_HOVER_POINTS)
    dots = "".join(
        f'<circle cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" r="{4 if len(finite) > 30 else 2.5}">'
        f"<title>{escape(line.name)} {short(y)} at {escape(x_name)} {x:,.0f}</title></circle>"
        for x, y in finite[::stride]
    )
    # many dots would hide the line: they then show on hover only
    kind = "hover" if len(finite) > 30 else "dots"
    return f'<g class="c{index % 8}"><path d="{drawn}"/><g class="{kind}">{dots}</g></g>'


def _path(points: Sequence[tuple[float, float]], x_scale: Scale, y_scale: Scale) -> str:
    commands, is_down = [], False
    for x, y in points:
        if not math.isfinite(y):
            is_down = False
            continue
        commands.append(f"{'L' if is_down else 'M'}{x_scale(x):.1f} {y_scale(y):.1f}")
        is_down = True
    return "".join(commands)
