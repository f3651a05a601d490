"""The time that a rank has spent waiting for others."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _WaitClock:
    """Adds up time spent waiting, on the host or on a GPU's compute stream."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._events.append((before, after))
        self._count_finished()

    def read(self) -> float:
        if self._events:
            self._events[-1][1].synchronize()
        self._count_finished()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count_finished(self) -> None:
        # keeps the queue short where nobody reads the clock
        while self._events and self._events[0][1].query():
            before, after = self._events.popleft()
            self._seconds += before.elapsed_time(after) / 1000


_clock = _WaitClock()
waiting = _clock.waiting


def exchange_seconds() -> float:
    """Seconds this process has waited for other ranks since the last call, and start again at 0.

    On a CPU: time on the host's clock. On a GPU: time the compute stream stood still, measured by events; reading
    waits for the work launched so far.
    """
    return _clock.read()
