"""The disk space of the cache: reserved before it is used; the copy that was used least recently is removed first."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from siglip_train.errors import UserError
from siglip_train.files.lock import lock

_BLOCK = 4096
# what a file of unknown length asks for at a time: a share of the limit, and not more than this
_STEP_SHARE, _MAX_STEP = 64, 64 << 20
_POLL = 0.1
PART = ".part"
# no other file is counted or removed, whoever has put it into the folder
_OURS = re.compile(r"[0-9a-f]{24}(-[0-9a-f]{8}(\.damaged)?\.tar|\.[a-z]+\.part)")


class NoRoomError(Exception):
    """Other transfers hold the room there is; later there will be some."""


class _Held(NamedTuple):
    """A file that takes room; `used` in nanoseconds, inf = it may not be removed."""

    used: float
    size: int
    path: Path


class DiskBudget:
    """A folder of copies (`NAME.tar`) and of transfers (`NAME.*.part`) that hold at most `limit` bytes together.

    All processes of a machine share it. A transfer holds the lock of its NAME, so that one whose process has ended
    is told from one that goes on. limit: None = no bound.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit = folder, limit
        self._locks = folder.parent / "locks"

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Alone among all processes and threads in what concerns the shard `name`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(parents=True, exist_ok=True)
        with (self._locks / name).open("w") as file:
            lock(file, wait=True)
            yield

    def touch(self, path: Path) -> None:
        """Note that a copy is in use."""
        # the time of reading alone: that of writing says when the copy was made
        with contextlib.suppress(OSError):
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def reserve(self, part: Path, size: int, cancelled: Callable[[], bool]) -> None:
        """Wait until `part`, which holds nothing yet, may grow to `size` bytes. Raises `NoRoomError`, `UserError`."""
        while True:
            try:
                return self.grow(part, size)
            except NoRoomError:
                # it may wait because it holds nothing that others could wait for
                if cancelled():
                    raise
            time.sleep(_POLL)

    def grow(self, part: Path, size: int) -> None:
        """Let `part` grow to `size` bytes, at once. Raises `NoRoomError`, `UserError` where it never can."""
        if self.limit is None:
            return
        if rounded(size) > self.limit:
            raise UserError(
                f"a shard takes {size / 2**30:.3g} GiB, more than data.cache_limit_gib ({self.limit / 2**30:.3g})"
            )
        with self.lock("room"):
            held = sorted(each for each in self._held() if each.path != part)
            excess = sum(each.size for each in held) + rounded(size) - self.limit
            for each in held:
                if excess <= 0:
                    break
                if each.used < float("inf"):
                    each.path.unlink(missing_ok=True)
                    excess -= each.size
            if excess > 0:
                raise NoRoomError("no room in the cache beside other transfers")
            # the size of the file is the reservation that others see
            os.truncate(part, size)

    def ahead(self, size: int) -> int:
        """What a transfer of unknown length that has come to `size` bytes should ask for."""
        if self.limit is None:
            return size
        return max(size, min(size + min(self.limit // _STEP_SHARE, _MAX_STEP), self.limit // _BLOCK * _BLOCK))

    def _held(self) -> Iterator[_Held]:
        for entry in os.scandir(self.folder):
            if not _OURS.fullmatch(entry.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                stat, path = entry.stat(), Path(entry.path)
                if path.suffix != PART:
                    yield _Held(stat.st_atime_ns, rounded(stat.st_size), path)
                elif self._is_left(path):
                    path.unlink()
                else:
                    yield _Held(float("inf"), rounded(stat.st_size), path)

    def _is_left(self, part: Path) -> bool:
        """Has the process of a transfer ended without removing it?"""
        with (self._locks / part.name.partition(".")[0]).open("w") as file:
            return lock(file)


class PartialFile:
    """A file on its way into a `DiskBudget`, named `NAME.KIND.part`: it asks for room before it takes any."""

    def __init__(self, room: DiskBudget, name: str, kind: str, cancelled: Callable[[], bool]) -> None:
        self.path = room.folder / f"{name}.{kind}{PART}"
        self._room, self._cancelled = room, cancelled
        # unbuffered, as chunks are large and its position is its size
        self._file = self.path.open("wb", buffering=0)
        self._reserved = 0

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        # where it has become a copy, this name is gone
        self.path.unlink(missing_ok=True)

    def begin(self, position: int, length: int) -> None:
        """Forget what follows `position`; `length` bytes are to come in all, -1 = unknown."""
        self._file.seek(position)
        self._file.truncate()
        self._reserved = position
        if length >= 0:
            if position:
                self._room.grow(self.path, length)
            else:
                self._room.reserve(self.path, length, self._cancelled)
            self._reserved = length

    def write(self, data: bytes) -> None:
        """Append. Raises `NoRoomError`, OSError."""
        end = self._file.tell() + len(data)
        if end > self._reserved:
            self._reserved = self._room.ahead(end)
            self._room.grow(self.path, self._reserved)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Give back what was reserved and not used."""
        self._file.truncate()

    def become(self, copy: Path) -> None:
        """Be complete under this name."""
        self.finish()
        # alone: who adds up the room could else find it under neither name
        with self._room.lock("room"):
            self.path.rename(copy)


def rounded(size: int) -> int:
    """A size in bytes as disks count it."""
    return -(-size // _BLOCK) * _BLOCK
