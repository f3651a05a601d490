"""Downloads a remote shard into a file, by http(s), fsspec or a command, with timeouts, retries and resumption.

`Fetch.run` makes attempts; each opens a source (`sources.py`), which a thread reads as long as there is `RetryPolicy`.
"""

import contextlib
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from siglip_train.data.remote.events import Event
from siglip_train.data.remote.locations import is_pipe, short_name
from siglip_train.data.remote.retry import Background, CancelledError, RetryPolicy, SlowError, Watch
from siglip_train.data.remote.sources import Start, heading, source
from siglip_train.errors import UserError, said

# "too early" and "too many requests" pass; 408 is a time-out
_PASSING = {408, 425, 429}
# "forbidden" is what storage says of a missing object to those who may not list it
_ABSENT = {403, 404, 410}


class FetchError(Exception):
    """A shard could not be had; the message is the reason alone. is_absent: there is none, or not for us."""

    def __init__(self, reason: str, *, is_absent: bool) -> None:
        super().__init__(reason)
        self.is_absent = is_absent


class DamagedError(Exception):
    """All bytes came, but not those that were promised."""


class Target(Protocol):
    """Where the bytes go."""

    def begin(self, position: int, length: int) -> None:
        """Forget what follows `position`; `length` bytes are to come in all, -1 = unknown."""

    def write(self, data: bytes) -> Any:
        """Append."""


def version_of(shard: str, retries: RetryPolicy, cancelled: Callable[[], bool] = lambda: False) -> str:
    """What changes when the content of a shard does, by one small request; always "" for a command.

    Raises `FetchError`, `CancelledError`.
    """
    if is_pipe(shard):
        return ""
    watch = Watch(retries, cancelled)

    def ask() -> str:
        with contextlib.closing(Background(heading(shard, retries.timeout_seconds), watch)) as items:
            return items.start().version

    return _with_retries(ask, retries, watch, lambda _attempt, _error: None)


@dataclass
class Fetch:
    """A shard on its way into `target`.

    check: called when all bytes are there, raises `DamagedError` where they are not what was promised.
    notice: told of every retry.
    """

    shard: str
    target: Target
    retries: RetryPolicy
    check: Callable[[], None]
    notice: Callable[[Event], None]
    cancelled: Callable[[], bool]

    def run(self) -> str:
        """Fetch it; return its version. Raises `FetchError`, `CancelledError`."""
        self._position, self._known = 0, Start("")
        self._watch = Watch(self.retries, self.cancelled)
        return _with_retries(self._attempt, self.retries, self._watch, self._on_retry)

    def _attempt(self) -> str:
        known = self._known
        items, abandon = source(self.shard, self._position, known, self.retries.timeout_seconds)
        try:
            with contextlib.closing(Background(items, self._watch)) as background:
                self._receive(background, known)
        finally:
            abandon()
        try:
            self.check()
        except DamagedError:
            self._forget()
            raise
        return self._known.version

    def _receive(self, items: Background, known: Start) -> None:
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


def _with_retries(
    attempt: Callable[[], str],
    retries: RetryPolicy,
    watch: Watch,
    on_retry: Callable[[int, Exception], None],
) -> str:
    for number in range(1, retries.attempts + 1):
        try:
            return attempt()
        except (CancelledError, UserError):
            raise
        except Exception as error:  # whatever the filesystem behind the URL raises
            if number == retries.attempts or _is_final(error) or watch.is_hopeless:
                tried = f" ({number} attempts)" if number > 1 else ""
                raise FetchError(said(error) + tried, is_absent=_is_absent(error)) from error
            on_retry(number, error)
            watch.pause(retries.pause(number))
    raise AssertionError("at least one attempt is made")


def _is_absent(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _ABSENT
    return isinstance(error, (FileNotFoundError, PermissionError))


def _is_final(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in _PASSING
    return isinstance(error, SlowError) or _is_absent(error)
