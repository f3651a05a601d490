"""Progress of a long command: a bar on a terminal, elsewhere a line for every quarter."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(total: int, doing: str, did: str, unit: str = "samples") -> Iterator[Callable[[int], None]]:
    """Yield `advance(units)`, to be called as they are done; `doing` and `did` as in "drawing" and "drew"."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            bar = bars.add_task(doing, total=total)
            yield lambda count: bars.update(bar, advance=count)
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        if (done + count) * 4 // total > done * 4 // total:
            print(f"{did} {done + count} of {total} {unit}", file=sys.stderr)  # noqa: T201
        done += count

    yield advance
