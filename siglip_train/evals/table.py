"""Evaluation results as plain text tables: a row a metric, and a row a language or group."""

import io
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from siglip_train.evals.base import Evaluation


def result_tables(evaluations: Mapping[str, Evaluation]) -> str:
    """Everything measured, as text of at most 100 columns without colours, for screen and log alike."""
    console = Console(file=io.StringIO(), width=100)
    table = Table("task", "metric")
    table.add_column("value", justify="right")
    has_intervals = any(name.endswith("_low") for each in evaluations.values() for name in each.metrics)
    if has_intervals:
        table.add_column("95 % interval")
    for task, evaluation in evaluations.items():
        metrics = evaluation.metrics
        for metric, value in metrics.items():
            # languages would fill pages: they get a table of their own
            if "/" in metric or metric.endswith(("_low", "_high")):
                continue
            row = [task, metric, _number(metric, value)]
            if f"{metric}_low" in metrics:
                row.append(f"{metrics[f'{metric}_low']:.4f} – {metrics[f'{metric}_high']:.4f}")
            table.add_row(*row)
        table.add_section()
    console.print(table)
    for task, evaluation in evaluations.items():
        _print_parts(console, task, evaluation.metrics)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def left_out(evaluations: Mapping[str, Evaluation]) -> str:
    """How many samples could not be used, by task and cause, in a line."""
    tasks = []
    for task, evaluation in evaluations.items():
        counts = evaluation.details.get("counts") or {}
        causes = {
            name.partition("/")[2]: count
            for name, count in counts.items()
            if name.startswith(("bad/", "excluded/"))
        }
        if causes:
            listed = ", ".join(f"{count} {cause}" for cause, count in causes.items())
            tasks.append(f"{task} {sum(causes.values())} ({listed})")
    return f"samples left out: {'; '.join(tasks) or 'none'}"


def _number(metric: str, value: float) -> str:
    if metric == "n":
        return f"{value:.0f}"
    # penalties may be far below what four decimals show
    return f"{value:.0e}" if 0 < value < 1e-3 else f"{value:.4f}"


def _print_parts(console: Console, task: str, metrics: Mapping[str, float]) -> None:
    """Print a row a language or group, from metrics named `part/metric`; the part may have slashes, as in `pt/BR`."""
    parts = [name.rpartition("/")[::2] for name in metrics if "/" in name]
    names = list(dict.fromkeys(metric for _, metric in parts))
    if not names:
        return
    # short headings and no vertical rules, because six columns must fit 80 characters
    headings = (name.replace("_retrieval_", "\n") for name in names)
    kind = "language" if "retrieval" in names[0] else "group"
    table = Table(kind, *headings, title=task, box=box.SIMPLE_HEAD, pad_edge=False)
    for part in dict.fromkeys(part for part, _ in parts):
        values = (metrics.get(f"{part}/{name}") for name in names)
        table.add_row(part, *("" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
