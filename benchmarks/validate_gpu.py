"""Prove on one GPU what was proved without: stages in processes of their own, under nine minutes on an H200.

Rows are written to DIR as they are measured, DIR/validation.json after every stage, and DIR/summary.md at the end.
Without a GPU the same stages run at reduced sizes, and what needs one says 'not measured'.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_stages import STAGES

TOTAL_SECONDS = 540
Result = dict[str, Any]


def run_stage(name: str, limit: float, folder: Path, *, quick: bool) -> Result:
    """Run a stage until it ends or its time is up; what it has measured until then counts."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("gpu_stages.py")),
        name,
        *(["--quick"] if quick else []),
    ]
    rows_path, start = folder / f"{name}.jsonl", time.monotonic()
    with rows_path.open("w") as rows, (folder / f"{name}.log").open("w") as log:
        # a session of its own, so that ranks and compilers end with it
        process = subprocess.Popen(command, stdout=rows, stderr=log, start_new_session=True)
        try:
            status = process.wait(timeout=limit)
            end = "done" if status == 0 else f"failed with status {status}, see {name}.log"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f"stopped after {limit:.0f} s"
    return {"end": end, "seconds": round(time.monotonic() - start, 1), "rows": read_rows(rows_path)}


def read_rows(path: Path) -> list[Result]:
    """The rows of a stage; libraries may have printed lines between them, and the last may have been cut off."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write(path: Path, text: str) -> None:
    """Write under a temporary name, and rename."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def summary(results: dict[str, Result]) -> str:
    """A chapter for each stage, with a table for rows of the same columns."""
    parts = ["# Validation"]
    for name, result in results.items():
        parts += ["", f"## {name}: {result['end']}, {result['seconds']} s", ""]
        columns: list[str] = []
        for row in result["rows"]:
            if list(row) != columns:
                columns = list(row)
                parts += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            parts.append(f"| {' | '.join(map(_shown, row.values()))} |")
    return "\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Run the stages in turn; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    end = time.monotonic() + TOTAL_SECONDS
    for name in arguments.stages:
        left = end - time.monotonic()
        if left < 5:
            results[name] = {"end": "left out, time was up", "seconds": 0.0, "rows": []}
        else:
            results[name] = run_stage(name, min(left, STAGES[name][1]), arguments.out, quick=arguments.quick)
        write(arguments.out / "validation.json", json.dumps(results, indent=1))
        print(f"{name}: {results[name]['end']}, {results[name]['seconds']} s", flush=True)
    write(arguments.out / "summary.md", summary(results))
    print(arguments.out / "summary.md")
    sys.exit(any(result["end"].startswith("failed") for result in results.values()))


if __name__ == "__main__":
    main()
