"""The record, in a folder of shards, of the command that made it, and its lock: what makes running it again safe."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from siglip_train.errors import UserError
from siglip_train.files.lock import lock_if_possible

_LOCK = ".lock"


def earlier_record(out_dir: Path, name: str, generator: str) -> dict[str, Any] | None:
    """The record `name` of an earlier run of `generator`, None for a folder that is new or empty.

    Raises `UserError` where something else is there.
    """
    if not out_dir.exists() or (out_dir.is_dir() and all(path.name == _LOCK for path in out_dir.iterdir())):
        return None
    try:
        present = json.loads((out_dir / name).read_text())
    except (OSError, ValueError):
        present = None
    if not isinstance(present, dict) or present.get("generator") != generator:
        raise UserError(f"{out_dir} exists and was not made by {generator}: name another folder")
    return present


class BusyError(UserError):
    """Another run has the folder."""


@contextlib.contextmanager
def alone_in(out_dir: Path) -> Iterator[None]:
    """Make a folder and keep other runs out of it, to the end of the block or of this process.

    Raises `BusyError` where another has it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / _LOCK
    with path.open("a+") as file:
        # the run that had it may have removed the file before this one locked it
        if not (lock_if_possible(file, out_dir) and os.fstat(file.fileno()).st_nlink > 0):
            file.seek(0)
            raise BusyError(
                f"{out_dir} is being written by process {file.read()}: wait for its end, or end it"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def require_same(out_dir: Path, present: Mapping[str, Any], record: Mapping[str, Any], did: str) -> None:
    """Raise `UserError` that names what differs between two runs; `did` as in "packed"."""
    changed = [f"{key} {present.get(key)}, now {value}" for key, value in record.items()
               if present.get(key) != value]  # fmt: skip
    if changed:
        raise UserError(
            f"{out_dir} was {did} from another source or with other options ({'; '.join(changed)}): "
            "name another folder, or remove this one"
        )
