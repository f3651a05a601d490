"""Read timeouts and a minimum transfer rate: a thread reads a source, so that waiting for it can be given up."""

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from siglip_train.data.remote.sources import Items, Start

# chunks that are read before the file takes them
_AHEAD = 4
# seconds after which a wait looks whether it is still wanted
_POLL = 0.5
# bytes a second: a fetch that has waited for so many time-outs in all must have been faster
_SLOWEST = 64 << 10
_LONG = 4
# shares of the time-out: 0.6 s after the first attempt, 1.2 s after the second, ... at most half a minute
_FIRST_PAUSE, _LONGEST_PAUSE = 1 / 100, 1 / 2


@dataclass(frozen=True)
class RetryPolicy:
    """How long a fetch goes on. timeout_seconds: of silence. attempts: in all."""

    timeout_seconds: float = 60.0
    attempts: int = 5

    def pause(self, attempt: int) -> float:
        """Seconds to wait after an attempt (1, 2, ...): doubling, and never the same for two processes."""
        share = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
        return self.timeout_seconds * share * random.uniform(0.5, 1.5)


USUAL = RetryPolicy()


class CancelledError(Exception):
    """No one waits for the shard any more."""


class SlowError(Exception):
    """RetryPolicy is at its end; another attempt would be no faster."""


class Watch:
    """Looks at the clock over all attempts of a fetch; only waiting for the source counts, not for our disk."""

    def __init__(self, retries: RetryPolicy, cancelled: Callable[[], bool]) -> None:
        self._timeout, self._cancelled = retries.timeout_seconds, cancelled
        self._waited, self._received = 0.0, 0

    @property
    def is_hopeless(self) -> bool:
        """Has it been waited for long, and with next to nothing to show for it?"""
        return self._waited >= _LONG * self._timeout and self._received < _SLOWEST * self._waited

    def next(self, items: queue.Queue) -> Start | bytes | BaseException | None:
        """What the background brings next. Raises TimeoutError after a silence, `SlowError` for a trickle."""
        begin = time.monotonic()
        try:
            item = self._get(items, begin + self._timeout)
        finally:
            self._waited += time.monotonic() - begin
        if isinstance(item, bytes):
            self._received += len(item)
            if self.is_hopeless:
                rate = self._received / self._waited / 1024
                raise SlowError(f"{rate:.1f} KiB/s, less than the {_SLOWEST >> 10} KiB/s that are waited for")
        return item

    def _get(self, items: queue.Queue, deadline: float) -> Start | bytes | BaseException | None:
        while True:
            if self._cancelled():
                raise CancelledError
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"silent for {self._timeout:g} seconds")
            with contextlib.suppress(queue.Empty):
                return items.get(timeout=min(left, _POLL))

    def pause(self, seconds: float) -> None:
        """Sleep, unless it is cancelled."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._cancelled():
                raise CancelledError
            time.sleep(min(left, _POLL))


class Background:
    """The items of a source, which another thread reads: a wait without end can be given up, whoever waits."""

    def __init__(self, items: Items, watch: Watch) -> None:
        self._queue: queue.Queue[Start | bytes | BaseException | None] = queue.Queue(_AHEAD)
        self._given_up = threading.Event()
        self._watch = watch
        # a daemon: one that is stuck must not hold up the end of the process
        threading.Thread(target=self._run, args=(items,), daemon=True).start()

    def start(self) -> Start:
        """The first item."""
        start = self._next()
        assert isinstance(start, Start)
        return start

    def chunks(self) -> Iterator[bytes]:
        """The others."""
        while (item := self._next()) is not None:
            assert isinstance(item, bytes)
            yield item

    def close(self) -> None:
        """Let the thread end as soon as it can."""
        self._given_up.set()

    def _next(self) -> Start | bytes | None:
        item = self._watch.next(self._queue)
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self, items: Items) -> None:
        with contextlib.closing(items):  # type: ignore[type-var]
            try:
                for item in items:
                    if not self._put(item):
                        return
            except BaseException as error:  # raised again where it is waited for
                self._put(error)
            else:
                self._put(None)

    def _put(self, item: Start | bytes | BaseException | None) -> bool:
        while not self._given_up.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_POLL)
                return True
        return False
