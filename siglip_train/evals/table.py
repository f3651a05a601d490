"""Evaluation results as plain text tables: a row a metric, and a row a language."""

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
    for task, evaluation in evaluations.items():
        for metric, value in evaluation.metrics.items():
            # languages would fill pages: they get a table of their own
            if "/" not in metric:
                table.add_row(task, metric, f"{value:.0f}" if metric == "n" else f"{value:.4f}")
        table.add_section()
    console.print(table)
    for task, evaluation in evaluations.items():
        _print_languages(console, task, evaluation.metrics)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _print_languages(console: Console, task: str, metrics: Mapping[str, float]) -> None:
    """Print a row a language, from metrics named `language/metric`."""
    names = list(dict.fromkeys(name.split("/")[1] for name in metrics if "/" in name))
    if not names:
        return
    # short headings and no vertical rules, because six columns must fit 80 characters
    headings = (name.replace("_retrieval_", "\n") for name in names)
    table = Table("language", *headings, title=task, box=box.SIMPLE_HEAD, pad_edge=False)
    for language in dict.fromkeys(name.split("/")[0] for name in metrics if "/" in name):
        table.add_row(language, *(f"{metrics[f'{language}/{name}']:.4f}" for name in names))
    console.print(table)
