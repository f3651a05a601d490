"""The page of a run: reads the files that the run left, puts them in order, writes `report.html`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip_train.errors import UserError, said
from siglip_train.files.atomic import write_text
from siglip_train.files.records import parse_record, read_records, read_text
from siglip_train.redact import redacted
from siglip_train.report.curves import Row, latest, training_charts, validation_charts
from siglip_train.report.numbers import duration, short, shown
from siglip_train.report.render import render
from siglip_train.report.sections import Details, task_section


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir/report.html` from what the run has left so far, and give its path.

    Reads metrics.jsonl, evaluations/*.json, config.yaml and environment.json; each may be missing.
    Raises UserError where there is no such folder, and where a stranger has put other values into these files.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"no run directory {run_dir}: give the run_dir of a training")
    found = {
        path.stem: parse_record(read_text(path)) for path in sorted((run_dir / "evaluations").glob("*.json"))
    }
    evaluations = {task: evaluation for task, evaluation in found.items() if evaluation}
    files = {"Configuration": run_dir / "config.yaml", "Environment": run_dir / "environment.json"}
    texts = {title: redacted(read_text(path)) for title, path in files.items()}
    rows = read_records(run_dir / "metrics.jsonl")
    try:
        return _write(run_dir / "report.html", run_dir.resolve().name, evaluations, rows, texts)
    except OSError:
        raise
    except Exception as error:  # whatever charts and templates make of values that no run has written
        raise UserError(
            f"no report of {run_dir}: its metrics.jsonl or evaluations/ hold what no run writes ({said(error)})"
        ) from error


def write_evaluation_report(target: Path, name: str, evaluations: Mapping[str, Details]) -> Path:
    """Write the same page about evaluations alone: name of the model, `metrics` and `details` of each task."""
    return _write(target, name, evaluations, [], {})


def _write(
    target: Path, title: str, evaluations: Mapping[str, Details], rows: list[Row], files: dict[str, str]
) -> Path:
    names = sorted({name for row in rows for name in row if name.startswith("data/")})
    page = render(
        "run.html",
        title=title,
        headline=_headline(rows, evaluations),
        training=training_charts(rows),
        validation=validation_charts(rows),
        tasks=[task_section(task, evaluation) for task, evaluation in evaluations.items()],
        counts=[(name.removeprefix("data/"), _whole(latest(rows, name))) for name in names],
        files=files,
    )
    write_text(target, page)
    return target


def _headline(rows: list[Row], evaluations: Mapping[str, Details]) -> dict[str, str]:
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    values = {
        "training loss": _number(latest(rows, "train/loss")),
        "steps": _number(latest(rows, "step")),
        "pairs seen": _number(latest(rows, "samples_seen")),
        "pairs per second": _number(latest(rows, "train/samples_per_second")),
        "logged time": duration(max(times) - min(times)) if times else None,
    }
    for task, evaluation in evaluations.items():
        # an evaluator puts the number that matters most first
        for metric, value in list((evaluation.get("metrics") or {}).items())[:1]:
            values[f"{task}: {metric}"] = shown(value, metric)
    return {label: value for label, value in values.items() if value}


def _number(value: Any) -> str | None:
    return short(float(value)) if isinstance(value, int | float) else None


def _whole(value: float) -> float:
    # counts are logged as floats, like everything; epochs of a source are no whole numbers
    return int(value) if value == int(value) else value
