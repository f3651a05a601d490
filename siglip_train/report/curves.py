"""Which numbers of `metrics.jsonl` share a chart: losses, optimizer, speed, evaluations."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

from siglip_train.report.charts import Series, line_chart

Row = dict[str, Any]
Point = tuple[float, float]

# title -> series name -> metric
_TRAINING_CHARTS: dict[str, dict[str, str]] = {
    "learning rate": {"lr": "train/lr"},
    "logit scale (multiplier)": {"scale": "train/logit_scale"},
    "logit bias": {"bias": "train/logit_bias"},
    "samples per second": {"all ranks": "train/samples_per_second"},
    "seconds per step": {"all": "train/step_time", "computing": "train/compute_time"},
    "model FLOPs utilisation": {"MFU": "train/mfu"},
    "TFLOP/s per rank": {"achieved": "train/tflops_per_rank"},
    "memory, GiB": {"peak": "train/memory_gib"},
}
_GRADIENT_NORMS = {"before clipping": "train/grad_norm", "after clipping": "train/grad_norm_clipped"}
# shown as shares of the step, or a constant multiple of what is shown
_SHOWN_OTHERWISE = {"train/data_time", "train/exchange_time", "train/samples_per_second_per_rank"}


def training_charts(rows: list[Row]) -> str:
    """Give the charts of training: losses first, then the known groups, then whatever else was logged."""
    losses = _distinct_losses(rows)
    charts_shown = (*_TRAINING_CHARTS.values(), _GRADIENT_NORMS)
    shown = {name for chart in charts_shown for name in chart.values()} | _SHOWN_OTHERWISE
    others = [name for name in _names(rows, "train/") if name not in shown and not name.endswith("loss")]
    charts = [
        line_chart("training loss", [Series(_tail(name), _points(rows, name)) for name in losses]),
        line_chart("gradient norm", _series(rows, _GRADIENT_NORMS), y="log if wide"),
        *(line_chart(title, _series(rows, chart)) for title, chart in _TRAINING_CHARTS.items()),
        line_chart("share of the step spent waiting", _waits(rows)),
        *(line_chart(_tail(name), [Series(_tail(name), _points(rows, name))]) for name in others),
    ]
    return "".join(charts)


def _distinct_losses(rows: list[Row]) -> list[str]:
    # with one objective of weight 1 the total and its only term are the same line
    names = sorted(name for name in _names(rows, "train/") if name.endswith("loss"))
    lines = {tuple(map(str, _points(rows, name))): name for name in reversed(names)}
    return sorted(lines.values())


def validation_charts(rows: list[Row]) -> str:
    """Give a chart for each task and kind of metric; languages are left to the tables."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in _names(rows, "val/"):
        match name.split("/"):
            case [_, task, metric] if metric != "n":
                groups.setdefault((task, _kind(metric)), []).append(name)
    return "".join(
        line_chart(f"{task}: {kind}", [Series(_tail(name), _points(rows, name)) for name in names])
        for (task, kind), names in groups.items()
    )


def latest(rows: list[Row], name: str) -> Any:
    """Give the last value logged under `name`, or None."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def _kind(metric: str) -> str:
    # acc1 and acc5, recall@1 and recall@10, the three losses: one chart each
    stem = re.sub(r"@?\d+$", "", metric)
    return (
        "loss"
        if stem.endswith("loss")
        else stem.replace("_mean_rank", "_rank").replace("_median_rank", "_rank")
    )


def _names(rows: Iterable[Row], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)))


def _points(rows: Iterable[Row], name: str) -> list[Point]:
    return _points_of(rows, lambda row: row.get(name))


def _points_of(rows: Iterable[Row], value_of: Callable[[Row], Any]) -> list[Point]:
    values = ((row.get("step"), value_of(row)) for row in rows)
    return sorted(
        (float(step), float(value)) for step, value in values if _is_number(step) and _is_number(value)
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _series(rows: Iterable[Row], metrics: dict[str, str]) -> list[Series]:
    return [Series(name, _points(rows, metric)) for name, metric in metrics.items()]


def _waits(rows: list[Row]) -> list[Series]:
    def share(name: str) -> Callable[[Row], float | None]:
        def of(row: Row) -> float | None:
            part, whole = row.get(name), row.get("train/step_time")
            return part / whole if _is_number(part) and _is_number(whole) and whole > 0 else None

        return of

    return [
        Series("for data", _points_of(rows, share("train/data_time"))),
        Series("for texts of other ranks", _points_of(rows, share("train/exchange_time"))),
    ]


def _tail(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def duration(seconds: float) -> str:
    """Give a time span in its two largest units: 3 h 12 min."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
