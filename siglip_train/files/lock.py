"""Locks that keep other processes out: each is of an open file, and ends with the file or with the process."""

import fcntl
import logging
from pathlib import Path
from typing import IO

_LOG = logging.getLogger(__name__)


def lock(file: IO, *, wait: bool = False) -> bool:
    """Lock an open file; False where another process has it, unless this one is to wait for it.

    Raises `OSError` on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_if_possible(file: IO, folder: Path) -> bool:
    """Lock a file in `folder` at once, or warn that this folder cannot be locked; False where another has the lock."""
    try:
        return lock(file)
    except OSError as error:
        _LOG.warning("%s knows no locks (%s): take care that one command alone writes it", folder, error)
        return True
