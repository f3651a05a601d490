"""Which numbers of `metrics.jsonl` share a chart: losses, optimizer, speed, evaluations."""

import re
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from siglip_train.report.charts import Point, Series, line_chart

Row = dict[str, Any]

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
_WAITS = {"for data": "train/data_time", "for texts of other ranks": "train/exchange_time"}
# shown as shares of the step, or a constant multiple of what is shown
_SHOWN_OTHERWISE = {"train/data_time", "train/exchange_time", "train/samples_per_second_per_rank"}


def training_charts(rows: list[Row]) -> list[Markup]:
    """Give the charts of training: losses first, then the known groups, then whatever else was logged."""
    losses = _distinct_losses(rows)
    charts_shown = (*_TRAINING_CHARTS.values(), _GRADIENT_NORMS)
    shown = {name for chart in charts_shown for name in chart.values()} | _SHOWN_OTHERWISE
    others = [name for name in _names(rows, "train/") if name not in shown and not name.endswith("loss")]
    return [
        line_chart("training loss", [Series(_tail(name), _points(rows, name)) for name in losses]),
        line_chart("gradient norm", _series(rows, _GRADIENT_NORMS), y="log if wide"),
        *(line_chart(title, _series(rows, chart)) for title, chart in _TRAINING_CHARTS.items()),
        line_chart("share of the step spent waiting", _series(rows, _WAITS, of="train/step_time")),
        *(line_chart(_tail(name), [Series(_tail(name), _points(rows, name))]) for name in others),
    ]


def _distinct_losses(rows: list[Row]) -> list[str]:
    # with one objective of weight 1 the total and its only term are the same line
    names = sorted(name for name in _names(rows, "train/") if name.endswith("loss"))
    lines = {tuple(map(str, _points(rows, name))): name for name in reversed(names)}
    return sorted(lines.values())


def validation_charts(rows: list[Row]) -> list[Markup]:
    """Give a chart for each task and kind of metric; languages are left to the tables."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in _names(rows, "val/"):
        match name.split("/"):
            case [_, task, metric] if metric != "n":
                groups.setdefault((task, _kind(metric)), []).append(name)
    return [
        line_chart(f"{task}: {kind}", [Series(_tail(name), _points(rows, name)) for name in names])
        for (task, kind), names in groups.items()
    ]


def latest(rows: list[Row], name: str) -> Any:
    """Give the last value logged under `name`, or None."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def _kind(metric: str) -> str:
    # acc1 and acc5, recall@1 and recall@10, the three losses: one chart each
    stem = re.sub(r"@?\d+$", "", metric)
    return "loss" if stem.endswith("loss") else re.sub("_(mean|median)_rank", "_rank", stem)


def _names(rows: Iterable[Row], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)))


def _points(rows: Iterable[Row], name: str, of: str | None = None) -> list[Point]:
    """The values of a metric, or their shares of the metric `of`, by step."""
    values: list[Any] = [(row.get("step"), row.get(name), row.get(of) if of else 1) for row in rows]
    return sorted(
        (float(step), value / whole)
        for step, value, whole in values
        if all(isinstance(each, int | float) for each in (step, value, whole)) and whole > 0
    )


def _series(rows: Iterable[Row], metrics: dict[str, str], of: str | None = None) -> list[Series]:
    return [Series(name, _points(rows, metric, of)) for name, metric in metrics.items()]


def _tail(name: str) -> str:
    return name.rsplit("/", 1)[-1]
