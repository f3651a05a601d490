"""Write a file so that it appears complete or not at all, and find out before the work whether it can be written."""

import os
import re
from pathlib import Path

from siglip_train.errors import UserError
from siglip_train.files import write_text


def check_targets(*paths: Path | None) -> None:
    """Make the folders of files that are written later, None = not wanted. Raises `UserError`, also for one twice."""
    wanted = [path for path in paths if path is not None]
    if len({path.resolve() for path in wanted}) < len(wanted):
        raise UserError(
            f"{wanted[-1]} is named for two files, and the later would replace the earlier: name another"
        )
    for path in wanted:
        _check_target(path)


def _check_target(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder of {path}: {error.strerror}") from error
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write into {path.parent}; name another folder")


def temporary(path: Path) -> Path:
    """The name beside `path` under which this process writes it; no other process has the same."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were ended have left under their `temporary` names."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.\d+", path.name):
            path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` under a temporary name beside `path`, then rename. Raises `UserError`."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
