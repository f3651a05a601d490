"""Numbers as a reader takes them in: few characters, round ticks, time spans."""

import math


def short(value: float, digits: int = 4) -> str:
    """Give a number in at most about six characters: 12.5k, 0.0312, 1e-05. digits: of a number below 1000."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if size >= 1000 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if size >= 1e-3 else f"{value:.2g}"


def percent(count: float, whole: float = 1) -> str:
    """Give a share in per cent."""
    return f"{100 * count / whole:.3g} %" if whole else "–"


def shown(value: float | None, name: str) -> str:
    """Give the metric `name`: recalls and accuracies in per cent, other numbers as they are; null in JSON is NaN."""
    if value is None:
        return "nan"
    is_share = "recall" in name or "acc" in name
    return f"{100 * value:.1f} %" if is_share and math.isfinite(value) else short(value)


def duration(seconds: float) -> str:
    """Give a time span in its two largest units: 3 h 12 min."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def round_step(least: float) -> float:
    """Give the smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def ticks(low: float, high: float, count: int = 5, *, is_whole: bool = False) -> list[float]:
    """Give about `count` round numbers within low..high. is_whole: whole numbers only."""
    step = round_step((high - low) / count)
    step = max(step, 1.0) if is_whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Give at most nine of 1, 2, 5 times the powers of ten within low..high: fewer a decade on a longer axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        values = [float(f"{factor}e{power}") for power in powers for factor in factors]
        found = [value for value in values if low * 0.999 <= value <= high * 1.001]
        if len(found) <= 9:
            break
    stride = max(1, math.ceil(len(found) / 9))
    return found[::stride] if len(found) > 2 else ticks(low, high)
