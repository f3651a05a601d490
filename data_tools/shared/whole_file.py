"""Find out before the work whether the files that are to come of it can be written."""

import os
from pathlib import Path

from siglip_train.errors import UserError


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
