"""Writes the numbers of a run to files and services; one that fails (full disk, no network) never ends the run."""

import hashlib
import importlib
import logging
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from siglip_train.errors import UserError, said
from siglip_train.files.atomic import write_text
from siglip_train.files.records import parse_record, read_text, to_json
from siglip_train.redact import redacted_values

log = logging.getLogger(__name__)

# records that a place which fails is owed; of a long outage the oldest are dropped
_KEPT = 10_000
# seconds between two attempts: W&B may wait for a network each time, and all ranks with it
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 3600.0


class Record(NamedTuple):
    """The metrics of one step; time: seconds since 1970."""

    step: int
    samples_seen: int
    time: float
    metrics: dict[str, float]


class Place(Protocol):
    """Takes records. After an error it is opened again, which must be harmless where it is open, and given the same."""

    def open(self) -> None: ...

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Sink:
    """A place, and what it is owed while it fails: that is said once, records are kept, and it is tried again later.

    first_pause: seconds until the second attempt; each pause is twice the last.
    """

    def __init__(self, name: str, place: Place, *, first_pause: float = _FIRST_PAUSE) -> None:
        self._name, self._place = name, place
        self._first_pause = self._pause = first_pause
        self._owed: deque[Record] = deque(maxlen=_KEPT)
        self._dropped = 0
        self._failed = False
        self._next_attempt = -math.inf
        self._hand_over()

    def write(self, record: Record) -> None:
        """Hand over a record, or keep it for later."""
        self._dropped += len(self._owed) == _KEPT
        self._owed.append(record)
        if time.monotonic() >= self._next_attempt:
            self._hand_over()

    def close(self) -> None:
        """Try a last time, and finish."""
        if self._owed:
            self._hand_over()
        if lost := self._dropped + len(self._owed):
            log.warning("%s: %d records are lost", self._name, lost)
        try:
            self._place.close()
        except Exception as error:
            log.warning("%s: %s", self._name, said(error))

    def _hand_over(self) -> None:
        owed = len(self._owed)
        try:
            self._place.open()
            while self._owed:
                self._place.write(self._owed[0])
                self._owed.popleft()
        except Exception as error:
            if not self._failed:
                log.warning(
                    "%s: %s; the run goes on, and what is missing there is written as soon as it can be",
                    self._name,
                    said(error),
                )
            self._failed = True
            self._next_attempt = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            return
        if self._failed:
            log.info("%s: works again, %d records were owed", self._name, owed)
        self._failed, self._pause = False, self._first_pause


class JsonLines:
    """One JSON object a line. A line is whole or not there, also on a disk that fills up in the middle of it.

    resumed_step: records past it are dropped at the beginning, as they will be written again.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path, self._resumed_step = path, resumed_step
        self._file: BinaryIO | None = None
        self._end = 0

    def open(self) -> None:
        """Open the file where it is not."""
        if self._file is None:
            _drop_after(self._path, self._resumed_step)
            self._file = self._path.open("ab", buffering=0)
            self._end = os.fstat(self._file.fileno()).st_size

    def write(self, record: Record) -> None:
        """Append a line; a value that is not finite is null, and stands by name under `not_finite`."""
        assert self._file is not None, "it is open"
        content: dict[str, Any] = {
            "step": record.step, "samples_seen": record.samples_seen, "time": record.time, **record.metrics
        }  # fmt: skip
        not_finite = {name: str(value) for name, value in record.metrics.items() if not math.isfinite(value)}
        if not_finite:
            content["not_finite"] = not_finite
        line = f"{to_json(content)}\n".encode()
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written, the disk is full")
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _drop_after(path: Path, step: int) -> None:
    """Remove records past the step a run resumes from: they will be written again."""
    lines = read_text(path).splitlines()
    # without the line that was being written when the run was killed
    records = [(line, record) for line in lines if (record := parse_record(line)) is not None]
    kept = [line for line, record in records if record.get("step", math.inf) <= step]
    if len(kept) < len(lines):
        log.info(
            "metrics.jsonl: %d records past step %d are dropped and written anew",
            len(lines) - len(kept),
            step,
        )
        write_text(path, "".join(line + "\n" for line in kept))


class TensorBoard:
    """Scalars in event files. Raises `UserError` where the package is missing."""

    def __init__(self, folder: Path) -> None:
        _need("tensorboard", "log.tensorboard=true", "tensorboard")
        self._folder = folder
        self._writer: Any = None

    def open(self) -> None:
        """Begin a file where none is open."""
        if self._writer is None:
            self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(self._folder))

    def write(self, record: Record) -> None:
        """A scalar for each metric."""
        try:
            for name, value in record.metrics.items():
                self._writer.add_scalar(name, value, record.step, walltime=record.time)
        except Exception:
            # once its thread has met an error it takes nothing more; the next one begins another file
            self._writer = None
            raise

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run there, whose id follows from the place, so that a resumed run goes on in its own curves.

    Raises `UserError` where the package is missing.
    """

    def __init__(self, run_dir: Path, *, project: str, mode: str, run_config: dict[str, Any]) -> None:
        self._wandb = _need("wandb", f"log.wandb={mode}", "wandb")
        place = hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=4).hexdigest()
        self._arguments = {
            "project": project, "name": run_dir.name, "dir": str(run_dir), "mode": mode,
            "config": redacted_values(run_config), "resume": "allow", "id": f"{run_dir.name}-{place}",
            # the command line, and the address that git fetches from: either may hold a password
            "settings": self._wandb.Settings(x_disable_meta=True),
        }  # fmt: skip
        self._run: Any = None

    def open(self) -> None:
        """Begin the run, or go on with it."""
        if self._run is None:
            self._run = self._wandb.init(**self._arguments)

    def write(self, record: Record) -> None:
        """All metrics at once; the step is the x axis."""
        self._run.log({"samples_seen": record.samples_seen, **record.metrics}, step=record.step)

    def close(self) -> None:
        """Finish the run there."""
        if self._run is not None:
            self._run.finish()


def _need(package: str, key: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{key} needs the package {package}: pip install 'siglip-train[{extra}]'") from None
