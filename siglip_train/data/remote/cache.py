"""Local copies of shards that cannot be read where they are: remote ones and packed ones, in a folder of bounded size.

How a sample of a remote shard is read: `ShardReader.read` opens the copy; where there is none, `ShardCache.local_tar`
makes one: alone among all processes, `Fetch.run` brings the bytes into a `PartialFile`, for which `DiskBudget` makes
room.
"""

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from siglip_train.data.remote.disk_budget import DiskBudget, NoRoomError, PartialFile
from siglip_train.data.remote.events import Event, Events
from siglip_train.data.remote.failed import FailedShards, Failure, UnavailableShardError
from siglip_train.data.remote.fetch import DamagedError, Fetch, FetchError, version_of
from siglip_train.data.remote.gunzip import gunzip, is_gzip
from siglip_train.data.remote.limits import MAX_INDEX_BYTES, USUAL_LIMITS, Limits, OversizedError
from siglip_train.data.remote.locations import COPIES, cache_folder, is_remote, short_name
from siglip_train.data.remote.retry import USUAL, RetryPolicy
from siglip_train.errors import UserError, said

_DAMAGED = ".damaged.tar"


class ExpectedShard(NamedTuple):
    """What is known of a shard before it is here. version: None = ask. bytes: -1, sha256: "" = unknown."""

    version: str | None = None
    bytes: int = -1
    sha256: str = ""

    @property
    def is_promise(self) -> bool:
        """Is it known what must come, whatever the source calls its version?"""
        return self.bytes >= 0

    def check(self, *files: Path) -> None:
        """Is one of these forms of the shard the promised one? Raises `DamagedError`."""
        if not self.is_promise:
            return
        sizes = [file.stat().st_size for file in files]
        if self.bytes not in sizes:
            raise DamagedError(f"it has {sizes[-1]} bytes, but {self.bytes} in the index beside it")
        if self.sha256 and self.sha256 not in map(_sha256, files):
            raise DamagedError("its SHA-256 is not that of the index beside it")


UNKNOWN = ExpectedShard()


def local_tar(shard: str, folder: Path) -> Path:
    """A plain tar on this machine with the content of a shard, for tools. Raises `UserError`.

    A local plain tar is used where it is. Of everything else there is a copy in `folder`, made once. A gzip stream
    that breaks off is kept as far as it goes; `was_damaged` tells.
    """
    try:
        return ShardCache(folder).local_tar(shard)
    except UnavailableShardError as error:
        raise UserError(f"cannot read shard {shard}: {error.detail}") from error
    except OversizedError as error:
        raise UserError(f"cannot read shard {shard}: {error}") from error


def was_damaged(path: Path) -> bool:
    """Did `local_tar` keep what could be unpacked of a broken gzip stream?"""
    return path.name.endswith(_DAMAGED)


def never() -> bool:
    """Nothing is cancelled."""
    return False


@dataclass
class ShardCache:
    """Makes and finds local copies. limit: bytes of all of them, None = no bound. events: what there is to report.

    since: shards that failed before are tried anew. cancelled: asked while waiting for a remote shard. tries_first:
    tries failed shards again as soon as they are due; others leave it some time, as they would make samples wait.
    limits: of what shards and their members may take.
    """

    folder: Path
    limit: int | None = None
    retries: RetryPolicy = USUAL
    cancelled: Callable[[], bool] = never
    since: float = field(default_factory=time.time)
    events: Events = field(default_factory=Events)
    tries_first: bool = False
    limits: Limits = USUAL_LIMITS

    def __post_init__(self) -> None:
        """Name the folders."""
        self.room = DiskBudget(self.folder / COPIES, self.limit)
        self.failed = FailedShards(self.folder / "failed", self.retries, self.since)

    @classmethod
    def at(
        cls,
        folder: str | None,
        limit_gib: float | None = None,
        retries: RetryPolicy = USUAL,
        limits: Limits = USUAL_LIMITS,
    ) -> "ShardCache":
        """The cache in a folder that a user names, None = the usual one. Raises `UserError`."""
        limit = None if limit_gib is None else int(limit_gib * 2**30)
        return cls(cache_folder(folder), limit, retries, limits=limits)

    def name(self, shard: str) -> str:
        """What the cache calls a shard, whatever its version."""
        return _digest(shard)

    def identify(self, shard: str) -> ExpectedShard:
        """Ask a remote shard for its version, which costs a small request. Raises `FetchError`, `UserError`."""
        return (
            ExpectedShard(version_of(shard, self.retries, self.cancelled))
            if is_remote(shard)
            else ExpectedShard()
        )

    def path(self, shard: str, known: ExpectedShard) -> Path:
        """Where a copy of this very version is or would be; a local plain tar is its own. Raises `FetchError`."""
        if not is_remote(shard):
            if not is_gzip(Path(shard)):
                return Path(shard)
            stat = os.stat(shard)
            return self._place(os.path.abspath(shard), f"{stat.st_size} {stat.st_mtime_ns}")
        version = self.identify(shard).version if known.version is None else known.version
        return existing(self._place(shard, version or ""))

    def is_copy(self, path: Path) -> bool:
        """Is it in this cache?"""
        return path.parent == self.room.folder

    def has(self, path: Path) -> bool:
        """Is the copy there?"""
        return existing(path).exists()

    def may_try(self, shard: str) -> bool:
        """Has it not failed, or long enough ago?"""
        failure = self.failed.find(self.name(shard))
        return failure is None or self._is_due(failure)

    def read_small(self, url: str) -> bytes:
        """An index of shards, which fits into memory. Raises `FetchError`, `UserError`."""
        content = _Memory()
        Fetch(url, content, self.retries, lambda: None, self.events.append, self.cancelled).run()
        return content.getvalue()

    def accept(self, shard: str) -> None:
        """Note that a copy is what was promised; a shard that had failed is back."""
        if self.failed.remove(self.name(shard)):
            self.events.append(Event("shards_back", f"shard {short_name(shard)} is back"))

    def reject(self, shard: str, path: Path, reason: str) -> UnavailableShardError:
        """The error to raise for a copy that is not what was promised; it is removed, to be fetched again later."""
        path.unlink(missing_ok=True)
        return self._failure(shard, reason)

    def local_tar(self, shard: str, known: ExpectedShard = UNKNOWN) -> Path:
        """A plain tar with the content of a shard, fetched or unpacked where that has not been done.

        Raises `UnavailableShardError` for a remote shard that cannot be had or has failed before, `OversizedError` for
        a local one beyond the limits, `UserError` for what else another attempt would not change, `CancelledError`.
        """
        try:
            path = self.path(shard, known)
            if path.exists():
                return path
            return self._fetched(shard, path, known) if is_remote(shard) else self._unpacked(shard, path)
        except FetchError as error:
            raise self._failure(shard, str(error)) from error
        except OSError as error:
            raise UserError(f"cannot read shard {shard}: {said(error)}") from error

    def _place(self, shard: str, version: str) -> Path:
        return existing(self.room.folder / f"{self.name(shard)}-{_digest(version)[:8]}.tar")

    def _unpacked(self, shard: str, path: Path) -> Path:
        while True:
            # others that unpack hold the room; each gives up its own in turn, so that one gets on
            with contextlib.suppress(NoRoomError):
                return self._try_to_unpack(shard, path)
            time.sleep(self.retries.pause(1))

    def _try_to_unpack(self, shard: str, path: Path) -> Path:
        name = self.name(os.path.abspath(shard))
        with self.room.lock(name), PartialFile(self.room, name, "unpacked", never) as part:
            if (present := existing(path)).exists():
                return present
            return _kept(part, path, intact=gunzip(Path(shard), part, self.limits))

    def _fetched(self, shard: str, path: Path, known: ExpectedShard) -> Path:
        name = self.name(shard)
        self._refuse_failed(name)
        with self.room.lock(name):
            # another process may have had it, or failed, while this one waited
            if (present := existing(path)).exists():
                return present
            failure = self._refuse_failed(name)
            if failure:
                self.failed.hold(name, failure)
            try:
                return self._copy_of_changed(shard, known) or self._fetch(shard, name, known)
            except (FetchError, DamagedError, OversizedError, NoRoomError, OSError) as error:
                # noted before the lock is free, or the next process would try as patiently
                is_said = isinstance(error, (FetchError, DamagedError, OversizedError))
                reason = str(error) if is_said else said(error)
                raise self._failure(shard, reason) from error

    def _copy_of_changed(self, shard: str, known: ExpectedShard) -> Path | None:
        """The copy that another process has made of what a shard has become since it was counted."""
        if known.version is None or known.is_promise:
            return None
        now = self.identify(shard)
        if now == known:
            return None
        if (present := self.path(shard, now)).exists():
            return present
        self.events.append(
            Event("changed_shards", f"shard {short_name(shard)} has changed since it was counted")
        )
        return None

    def _fetch(self, shard: str, name: str, known: ExpectedShard) -> Path:
        with (
            PartialFile(self.room, name, "fetched", self.cancelled) as part,
            PartialFile(self.room, name, "unpacked", self.cancelled) as unpacked,
        ):

            def check() -> None:
                part.finish()
                if not is_gzip(part.path):
                    known.check(part.path)

            version = Fetch(shard, part, self.retries, check, self.events.append, self.cancelled).run()
            path = self._place(shard, (known.version or "") if known.is_promise else version)
            if not is_gzip(part.path):
                return _kept(part, path, intact=True)
            intact = gunzip(part.path, unpacked, self.limits)
            unpacked.finish()
            # an index that was made from afar has seen nothing but the unpacked copy
            known.check(part.path, unpacked.path)
            return _kept(unpacked, path, intact=intact)

    def _refuse_failed(self, name: str) -> Failure | None:
        failure = self.failed.find(name)
        if failure and not self._is_due(failure):
            raise UnavailableShardError(failure.reason)
        return failure

    def _is_due(self, failure: Failure) -> bool:
        delay = 0 if self.tries_first else self.retries.timeout_seconds / 2
        return time.time() >= failure.until + delay

    def _failure(self, shard: str, reason: str) -> UnavailableShardError:
        failure = self.failed.add(self.name(shard), shard, reason)
        message = (
            f"shard {short_name(shard)} is unavailable: {reason}; other samples take the place of its own;"
            f" it is tried again in {failure.until - failure.at:.0f} s"
        )
        self.events.append(Event("failed_shards", message) if failure.times == 1 else Event("fetch_retries"))
        return UnavailableShardError(reason)


class _Memory(io.BytesIO):
    """A target of a fetch that is no file."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > MAX_INDEX_BYTES:
            raise UserError(f"it is longer than {MAX_INDEX_BYTES} bytes")
        return super().write(data)

    def begin(self, position: int, length: int) -> None:  # noqa: ARG002
        self.seek(position)
        self.truncate()


def existing(path: Path) -> Path:
    """The copy there is, be it of a damaged stream, else where it would be."""
    damaged = path.with_name(path.name.removesuffix(".tar") + _DAMAGED)
    return damaged if damaged.exists() else path


def _kept(part: PartialFile, path: Path, *, intact: bool) -> Path:
    final = path if intact else path.with_name(path.name.removesuffix(".tar") + _DAMAGED)
    part.become(final)
    return final


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
