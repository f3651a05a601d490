"""One remote shard into a file: http(s), fsspec and commands, with time-outs, retries and resumption.

`Fetch.run` makes attempts; each opens a source (`sources.py`), which another thread reads (`_Background`) while
`_Watch` looks at the clock.
"""

import contextlib
import queue
import random
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from siglip_train.data.locations import is_pipe, short_name
from siglip_train.data.sources import Items, Start, heading, source
from siglip_train.errors import UserError

# chunks that are read before the file takes them
_AHEAD = 4
# seconds after which a wait looks whether it is still wanted
_POLL = 0.5
# bytes a second: a fetch that has waited for so many time-outs in all must have been faster
_SLOWEST = 64 << 10
_LONG = 4
# shares of the time-out: 0.6 s after the first attempt, 1.2 s after the second, ... at most half a minute
_FIRST_PAUSE, _LONGEST_PAUSE = 1 / 100, 1 / 2
# "too early" and "too many requests" pass; 408 is a time-out
_PASSING = {408, 425, 429}
# "forbidden" is what storage says of a missing object to those who may not list it
_ABSENT = {403, 404, 410}


@dataclass(frozen=True)
class Patience:
    """How long a fetch goes on. timeout_seconds: of silence. attempts: in all."""

    timeout_seconds: float = 60.0
    attempts: int = 5

    def pause(self, attempt: int) -> float:
        """Seconds to wait after an attempt (1, 2, ...): doubling, and never the same for two processes."""
        share = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
        return self.timeout_seconds * share * random.uniform(0.5, 1.5)


USUAL = Patience()


class FetchError(Exception):
    """A shard could not be had; the message is the reason alone. is_absent: there is none, or not for us."""

    def __init__(self, reason: str, *, is_absent: bool) -> None:
        super().__init__(reason)
        self.is_absent = is_absent


class DamagedError(Exception):
    """All bytes came, but not those that were promised."""


class CancelledError(Exception):
    """No one waits for the shard any more."""


class _SlowError(Exception):
    """Patience is at its end; another attempt would be no faster."""


class Event(NamedTuple):
    """Something about a shard to be counted under `name` and, unless it is "", to be logged."""

    name: str
    message: str = ""


class Target(Protocol):
    """Where the bytes go."""

    def begin(self, position: int, length: int) -> None:
        """Forget what follows `position`; `length` bytes are to come in all, -1 = unknown."""

    def write(self, data: bytes) -> Any:
        """Append."""


def version_of(shard: str, patience: Patience, cancelled: Callable[[], bool] = lambda: False) -> str:
    """What changes when the content of a shard does, by one small request; always "" for a command.

    Raises `FetchError`, `CancelledError`.
    """
    if is_pipe(shard):
        return ""
    watch = _Watch(patience, cancelled)

    def ask() -> str:
        with contextlib.closing(_Background(heading(shard, patience.timeout_seconds), watch)) as items:
            return items.start().version

    return _with_retries(ask, patience, watch, lambda _attempt, _error: None)


@dataclass
class Fetch:
    """A shard on its way into `target`.

    check: called when all bytes are there, raises `DamagedError` where they are not what was promised.
    notice: told of every retry.
    """

    shard: str
    target: Target
    patience: Patience
    check: Callable[[], None]
    notice: Callable[[Event], None]
    cancelled: Callable[[], bool]

    def run(self) -> str:
        """Fetch it; return its version. Raises `FetchError`, `CancelledError`."""
        self._position, self._known = 0, Start("")
        self._watch = _Watch(self.patience, self.cancelled)
        return _with_retries(self._attempt, self.patience, self._watch, self._on_retry)

    def _attempt(self) -> str:
        known = self._known
        items, abandon = source(self.shard, self._position, known, self.patience.timeout_seconds)
        try:
            with contextlib.closing(_Background(items, self._watch)) as background:
                self._receive(background, known)
        finally:
            abandon()
        try:
            self.check()
        except DamagedError:
            self._forget()
            raise
        return self._known.version

    def _receive(self, items: "_Background", known: Start) -> None:
        start = items.start()
        if start.position and start.version != known.version:
            self._forget()
            raise ConnectionError("it changed while it was fetched")
        self._position, self._known = start.position, start
        self.target.begin(start.position, start.length)
        for data in items.chunks():
            self.target.write(data)
            self._position += len(data)
        if start.length not in (-1, self._position):
            raise ConnectionError(f"connection lost after {self._position} of {start.length} bytes")

    def _forget(self) -> None:
        self._position, self._known = 0, Start("")

    def _on_retry(self, attempt: int, error: Exception) -> None:
        if not self._known.resumable:
            self._forget()
        first = f"shard {short_name(self.shard)}: {said(error)}; trying again" if attempt == 1 else ""
        self.notice(Event("fetch_retries", first))


def said(error: BaseException) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _with_retries(
    attempt: Callable[[], str],
    patience: Patience,
    watch: "_Watch",
    on_retry: Callable[[int, Exception], None],
) -> str:
    for number in range(1, patience.attempts + 1):
        try:
            return attempt()
        except (CancelledError, UserError):
            raise
        except Exception as error:  # whatever the filesystem behind the URL raises
            if number == patience.attempts or _is_final(error) or watch.is_hopeless:
                tried = f" ({number} attempts)" if number > 1 else ""
                raise FetchError(said(error) + tried, is_absent=_is_absent(error)) from error
            on_retry(number, error)
            watch.pause(patience.pause(number))
    raise AssertionError("at least one attempt is made")


def _is_absent(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _ABSENT
    return isinstance(error, (FileNotFoundError, PermissionError))


def _is_final(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in _PASSING
    return isinstance(error, _SlowError) or _is_absent(error)


class _Watch:
    """Looks at the clock over all attempts of a fetch; only waiting for the source counts, not for our disk."""

    def __init__(self, patience: Patience, cancelled: Callable[[], bool]) -> None:
        self._timeout, self._cancelled = patience.timeout_seconds, cancelled
        self._waited, self._received = 0.0, 0

    @property
    def is_hopeless(self) -> bool:
        """Has it been waited for long, and with next to nothing to show for it?"""
        return self._waited >= _LONG * self._timeout and self._received < _SLOWEST * self._waited

    def next(self, items: queue.Queue) -> Start | bytes | BaseException | None:
        """What the background brings next. Raises TimeoutError after a silence, `_SlowError` for a trickle."""
        begin = time.monotonic()
        try:
            item = self._get(items, begin + self._timeout)
        finally:
            self._waited += time.monotonic() - begin
        if isinstance(item, bytes):
            self._received += len(item)
            if self.is_hopeless:
                rate = self._received / self._waited / 1024
                raise _SlowError(
                    f"{rate:.1f} KiB/s, less than the {_SLOWEST >> 10} KiB/s that are waited for"
                )
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


class _Background:
    """The items of a source, which another thread reads: a wait without end can be given up, whoever waits."""

    def __init__(self, items: Items, watch: _Watch) -> None:
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
