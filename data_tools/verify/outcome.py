"""What `verify` says at its end: the table by cause, the report of all problems, the index of the shards."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.verify.checks import Rules
from data_tools.verify.shard import WHOLE_SHARD, ShardReport
from siglip_train.data.shards.manifest import Entry, index_content
from siglip_train.files.atomic import write_whole
from siglip_train.redact import redacted

_EXAMPLES = 3
# of a file or pipe, which has no width of its own
_PLAIN_WIDTH = 120


class Outcome:
    """The reports of all shards, counted. allow: the share of bad samples that still passes."""

    def __init__(self, reports: Sequence[ShardReport], rules: Rules, allow: float) -> None:
        self.reports = reports
        self.rules = rules
        self.samples = sum(report.samples for report in reports)
        self.bad_samples = sum(report.bad_samples for report in reports)
        self.whole_problems = sum(report.whole_problems for report in reports)
        # how many samples a broken shard has lost is not known, so that no share allows it
        self.passed = not self.whole_problems and self.bad_samples <= allow * self.samples

    def causes(self) -> dict[str, list[str]]:
        """Cause -> `shard/key (detail)` of every problem, the most frequent cause first."""
        found: dict[str, list[str]] = {}
        for report in self.reports:
            for problem in report.problems:
                place = f"{report.name}/{problem.key}" if problem.key else report.name
                found.setdefault(problem.cause, []).append(f"{place} ({problem.detail})")
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def print(self) -> None:
        """The table by cause, and a line that says pass or fail."""
        console = Console()
        if not console.is_terminal:
            console.width = _PLAIN_WIDTH
        table = Table("problem", "count", f"the first {_EXAMPLES}: shard/key (detail)")
        table.columns[1].justify = "right"
        causes = self.causes()
        for cause, places in causes.items():
            # not markup: a key may hold brackets
            table.add_row(cause, f"{len(places):,}", Text("\n".join(places[:_EXAMPLES]), overflow="fold"))
        if causes:
            console.print(table)
        print(self.verdict())

    def verdict(self) -> str:
        """`fail: 3 of 1,000 samples in 2 shards are bad (0.3 %)`."""
        where = f"{_counted(self.samples, 'sample')} in {_counted(len(self.reports), 'shard')}"
        share = self.bad_samples / self.samples if self.samples else 0.0
        line = f"{'pass' if self.passed else 'fail'}: {self.bad_samples:,} of {where} are bad ({share:.2%})"
        if self.whole_problems:
            line += (
                f"; {_counted(self.whole_problems, 'problem')} of whole shards, which --allow does not cover"
            )
        return line

    def write_report(self, path: Path) -> None:
        """Every problem, as JSON. Raises `UserError`."""
        problems = [
            {"shard": redacted(report.url), "key": problem.key, "cause": problem.cause, "detail": problem.detail,
             "whole_shard": problem.row == WHOLE_SHARD}
            for report in self.reports
            for problem in report.problems
        ]  # fmt: skip
        content = {
            "passed": self.passed,
            "samples": self.samples,
            "bad_samples": self.bad_samples,
            "causes": {cause: len(places) for cause, places in self.causes().items()},
            "rules": asdict(self.rules),
            "problems": problems,
        }
        _write_json(path, content)

    def write_index(self, path: Path) -> None:
        """What each shard holds, and its checksum, as training reads it. Raises `UserError`."""
        entries = [
            Entry(
                file=report.name,
                bytes=report.bytes,
                sha256=report.sha256,
                samples=report.samples,
                good_samples=report.samples - report.bad_samples,
                members=report.members,
                left_out=report.left_out,
                repeated=report.repeated,
            )
            for report in self.reports
        ]
        _write_json(path, index_content(entries))


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
