"""Remembers the shards that could not be fetched, for all processes of a machine, and retries after growing pauses."""

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from siglip_train.data.remote.retry import RetryPolicy
from siglip_train.errors import SampleError
from siglip_train.files.atomic import write_text
from siglip_train.redact import redacted

# of the time-out: 30 s and 10 min with the usual one of 60 s
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 10.0


class UnavailableShardError(SampleError):
    """A sample is of a shard that cannot be had now; it is tried again later."""

    def __init__(self, reason: str) -> None:
        super().__init__("shard unavailable", reason)


@dataclass(frozen=True)
class Failure:
    """A failed shard: why, how often in a row, when that was and when to try again (seconds since the epoch).

    shard, reason: for people, without secrets.
    """

    shard: str
    reason: str
    times: int
    at: float
    until: float


class FailedShards:
    """The failed shards of a cache folder. since: what failed before this time is forgotten."""

    def __init__(self, folder: Path, retries: RetryPolicy, since: float) -> None:
        self._folder, self._retries, self._since = folder, retries, since
        self._all: dict[str, Failure] = {}
        self._looked = float("-inf")

    def find(self, name: str) -> Failure | None:
        """The failure of the shard that the cache knows as `name`; None = it has not failed."""
        failure = self._read(self._folder / f"{name}.json")
        if failure is not None and name not in self._all:
            self._looked = float("-inf")
        return failure

    def all(self) -> dict[str, Failure]:
        """Every failed shard by its name in the cache, as it was at most a second ago, with all that `find` has met."""
        if time.monotonic() - self._looked > min(1.0, self._retries.timeout_seconds / 10):
            found = {path.stem: self._read(path) for path in sorted(self._folder.glob("*.json"))}
            self._all = {name: failure for name, failure in found.items() if failure is not None}
            self._looked = time.monotonic()
        return self._all

    def add(self, name: str, shard: str, reason: str) -> Failure:
        """Note that a shard could not be had, or again not."""
        earlier = self.find(name)
        return self._write(name, shard, reason, earlier.times + 1 if earlier else 1)

    def hold(self, name: str, failure: Failure) -> None:
        """Keep others from trying a shard again while this process does."""
        self._write(name, failure.shard, failure.reason, failure.times, _LONGEST_DELAY)

    def remove(self, name: str) -> bool:
        """Forget the failure of a shard; was there one?"""
        there = self.find(name) is not None
        (self._folder / f"{name}.json").unlink(missing_ok=True)
        return there

    def _read(self, path: Path) -> Failure | None:
        # a file that is being removed, or is not ours, says nothing
        with contextlib.suppress(OSError, ValueError, TypeError):
            failure = Failure(**json.loads(path.read_text()))
            if failure.at >= self._since:
                return failure
        return None

    def _write(self, name: str, shard: str, reason: str, times: int, delay: float | None = None) -> Failure:
        if delay is None:
            delay = min(_FIRST_DELAY * 2 ** (times - 1), _LONGEST_DELAY)
        now = time.time()
        failure = Failure(
            redacted(shard), redacted(reason), times, now, now + delay * self._retries.timeout_seconds
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / f"{name}.json", json.dumps(asdict(failure)))
        self._looked = float("-inf")
        return failure
