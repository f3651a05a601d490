"""The page: reads the files of a run, puts the fragments in order, writes `report.html`."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from siglip_train.errors import UserError
from siglip_train.files import write_text
from siglip_train.records import parse_record, read_records, read_text
from siglip_train.redact import redacted
from siglip_train.report.charts import short
from siglip_train.report.curves import Row, duration, latest, training_charts, validation_charts
from siglip_train.report.sections import shown, table, task_section, tiles
from siglip_train.report.style import STYLE


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir/report.html` from what the run has left so far, and give its path.

    Reads metrics.jsonl, evaluations/*.json, config.yaml and environment.json; each may be missing.
    Raises UserError where there is no such folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"no run directory {run_dir}: give the run_dir of a training")
    return _write(run_dir / "report.html", _page(run_dir))


def write_evaluation_report(target: Path, name: str, evaluations: Mapping[str, dict[str, Any]]) -> Path:
    """Write the same page about evaluations alone: name of the model, `metrics` and `details` of each task."""
    sections = "".join(task_section(task, evaluation) for task, evaluation in evaluations.items())
    return _write(target, _document(name, f"{_header(name, [], dict(evaluations))}{sections}"))


def _write(target: Path, page: str) -> Path:
    write_text(target, page)
    return target


def _page(run_dir: Path) -> str:
    rows = read_records(run_dir / "metrics.jsonl")
    evaluations = _read_evaluations(run_dir / "evaluations")
    name = run_dir.resolve().name
    body = "".join(
        (
            _header(name, rows, evaluations),
            _charts("Training", training_charts(rows)),
            _charts("Evaluations over training", validation_charts(rows)),
            "".join(task_section(task, evaluation) for task, evaluation in evaluations.items()),
            _data(rows),
            _file("Configuration", run_dir / "config.yaml"),
            _file("Environment", run_dir / "environment.json"),
        )
    )
    return _document(name, body)


def _header(name: str, rows: list[Row], evaluations: dict[str, dict[str, Any]]) -> str:
    return f"<header><h1>{escape(name)}</h1>{_headline(rows, evaluations)}</header>"


def _document(name: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: parse_record(read_text(path)) for path in sorted(folder.glob("*.json"))}
    return {task: evaluation for task, evaluation in found.items() if evaluation}


def _headline(rows: list[Row], evaluations: dict[str, dict[str, Any]]) -> str:
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
            values[f"{task}: {metric}"] = shown(metric, value)
    return tiles({label: value for label, value in values.items() if value})


def _number(value: Any) -> str | None:
    return short(float(value)) if isinstance(value, int | float) else None


def _charts(title: str, charts: str) -> str:
    return f'<section><h2>{title}</h2><div class="charts">{charts}</div></section>' if charts else ""


def _data(rows: list[Row]) -> str:
    names = sorted({name for row in rows for name in row if name.startswith("data/")})
    counts = [(name.removeprefix("data/"), _whole(latest(rows, name))) for name in names]
    return f"<section><h2>Data</h2>{table(('samples', 'number'), counts)}</section>" if counts else ""


def _whole(value: float) -> float:
    # counts are logged as floats, like everything; passes through a source are no whole numbers
    return int(value) if value == int(value) else value


def _file(title: str, path: Path) -> str:
    text = redacted(read_text(path))
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>" if text else ""
