"""The table of injected faults at the end of a test run: `record_fault` fills it, also from processes of xdist."""

from collections.abc import Callable
from typing import Any

import pytest

_COLUMNS = ("fault", "ranks", "what happened", "samples lost", "steps repeated")


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it once a fault has been survived, or has ended the run as it must; see the docstring of this package.

    lost: samples that were never trained on. repeated: steps that were taken twice. None = training did not go on.
    """

    def record(
        fault: str, *, ranks: int, happened: str, lost: int | None = None, repeated: int | None = None
    ) -> None:
        assert not lost, f"{fault}: {lost} samples are lost"
        row = [fault, ranks, happened, *("–" if value is None else value for value in (lost, repeated))]
        request.node.user_properties.append(("fault", row))

    return record


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call"
    ]
    rows = [
        list(map(str, row))
        for report in sorted(reports, key=lambda report: report.nodeid)
        for name, row in report.user_properties
        if name == "fault"
    ]
    if not rows:
        return
    terminalreporter.section(f"{len(rows)} faults injected")
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    for row in (_COLUMNS, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
