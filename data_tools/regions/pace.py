"""How long the whole set will take, said once after the first minute of the work."""

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

_FIRST = 60.0


class Work(NamedTuple):
    """What there is to do in a run: `shards` with some `samples` each, by so many `processes`."""

    shards: int
    samples: int
    processes: int


class Pace:
    """Counts what a process does from the end of its first batch on, since models take time to load.

    clock: seconds. say: gets the line.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] | None = None
    ) -> None:
        self.clock, self.say = clock, say or _to_stderr
        self._began: float | None = None
        self._done, self._said = 0.0, False

    def advance(self, samples: float, work: Work) -> None:
        """Note that so many samples are done: annotated, or passed over."""
        if self._began is None:
            self._began = self.clock()
            return
        self._done += samples
        seconds = self.clock() - self._began
        if self._said or seconds < _FIRST or not self._done:
            return
        self._said = True
        rate = self._done / seconds
        hours = work.shards * work.samples / (rate * work.processes) / 3600
        self.say(
            f"after a minute: {rate:,.1f} samples/s in each of {work.processes} processes, which makes about"
            f" {hours:,.1f} hours for {work.shards:,} shards of some {work.samples:,} samples"
        )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
