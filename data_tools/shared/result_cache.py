"""Results of shards on disk until a run is complete, so that an interrupted one goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

from siglip_train.data.processes import run_all
from siglip_train.data.remote.locations import is_remote
from siglip_train.errors import UserError


class _ShardTask(Protocol):
    @property
    def url(self) -> str: ...


Task = TypeVar("Task", bound=_ShardTask)
Result = TypeVar("Result")


@dataclass
class ResultCache(Generic[Result]):
    """Where results of a run lie, a line of JSON each, in the order of its tasks.

    identity: all that they depend on, as JSON; another run has another file. write, read: a result to JSON and back.
    """

    folder: Path
    identity: Any
    write: Callable[[Result], Any]
    read: Callable[[Any], Result]

    @property
    def file(self) -> Path:
        """Where they lie."""
        name = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:32]
        return self.folder / f"{name}.jsonl"

    def run(self, work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
        """`work(task)` of every task in their order: as kept, up to the first shard that has changed, then anew.

        Raises `UserError`.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = self.file.open("a+b")
        except OSError as error:
            raise UserError(
                f"cannot keep results in {self.folder}: {error.strerror}; name another --cache-dir"
            ) from error
        with kept as file:
            done = 0
            for result in self._earlier(file, tasks):
                yield result
                done += 1
            for task, result in zip(tasks[done:], run_all(work, tasks[done:], workers), strict=True):
                line = {"of": _name(task), "result": self.write(result)}
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                yield result

    def _earlier(self, file: IO[bytes], tasks: Sequence[Task]) -> Iterator[Result]:
        file.seek(0)
        for task in tasks:
            begin = file.tell()
            try:
                line = json.loads(file.readline())
            except ValueError:
                # the end, or the line that was being written when the run ended
                line = {"of": None}
            if line["of"] != _name(task):
                # results that follow would be out of their order
                file.truncate(begin)
                return
            yield self.read(line["result"])

    def forget(self) -> None:
        """Remove them: the run is complete."""
        self.file.unlink(missing_ok=True)


def _name(task: _ShardTask) -> list[str]:
    # a command or a URL may hold a secret
    return [hashlib.sha256(task.url.encode()).hexdigest()[:24], version(task.url)]


def version(path: str) -> str:
    """Changes when a local file does."""
    if is_remote(path) or not Path(path).exists():
        return ""
    stat = Path(path).stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def shards_identity(urls: Sequence[str]) -> dict[str, Any]:
    """The number of shards, and a hash of all names and of the sizes and times of those on this machine."""
    known = []
    for url in urls:
        stat = None if is_remote(url) else Path(url).stat()
        known.append([url, stat and stat.st_size, stat and stat.st_mtime_ns])
    fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
    return {"shards": len(urls), "shards_fingerprint": fingerprint}
