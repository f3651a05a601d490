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


def _number(metric: str, value: float) -> str:
    if metric == "n":
        return f"{value:.0f}"
    # penalties may be far below what four decimals show
    return f"{value:.0e}" if 0 < value < 1e-3 else f"{value:.4f}"


def _print_parts(console: Console, task: str, metrics: Mapping[str, float]) -> None:
    """Print a row a language or group, from metrics named `part/metric`."""
    names = list(dict.fromkeys(name.split("/")[1] for name in metrics if "/" in name))
    if not names:
        return
    # short headings and no vertical rules, because six columns must fit 80 characters
    headings = (name.replace("_retrieval_", "\n") for name in names)
    kind = "language" if "retrieval" in names[0] else "group"
    table = Table(kind, *headings, title=task, box=box.SIMPLE_HEAD, pad_edge=False)
    for language in dict.fromkeys(name.split("/")[0] for name in metrics if "/" in name):
        table.add_row(language, *(f"{metrics[f'{language}/{name}']:.4f}" for name in names))
    console.print(table)
