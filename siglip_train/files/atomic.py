"""Text files of users, and files and folders that appear complete or not at all, also after a power failure."""

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from siglip_train.errors import UserError

# what a filesystem answers that cannot do it for a folder, or at all: nothing is wrong with the file
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write a file under; at the end of the block it takes the place of `path`.

    Where the block fails, what it has written is removed, and an earlier file at `path` stays, as it does where the
    block leaves no file. Raises `OSError`.
    """
    # of the main thread it is the number of the process; no other thread on the machine has the same
    partial = path.with_name(f".{path.name}.{threading.get_native_id()}")
    # a link of that name in a stranger's folder would lead the content elsewhere
    partial.unlink(missing_ok=True)
    try:
        yield partial
        if not partial.exists():
            return
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def read_text(path: str | Path) -> str:
    """The text of a user's file, which is UTF-8, without the mark that Windows puts in front. Raises `UserError`."""
    path = Path(path).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 (line {line}, byte {error.object[error.start]:#x}): save it as UTF-8, or convert it"
            f" by `iconv -f latin1 -t utf-8`"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to a file that is complete or as it was before. Raises `OSError`."""
    with appearing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and no longer in memory alone.

    A rename without it can outlive a power failure that the content of the file did not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """`flush` every file and folder in `folder`, and `folder` itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def put_folder(partial: Path, folder: Path) -> None:
    """Give a complete folder its name; it is on the disk first. An earlier folder of this name is removed.

    A folder cannot take the place of another in one step: the earlier one steps aside, to `.NAME.replaced`.
    """
    flush_folder(partial)
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    os.replace(partial, folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were ended have left under the names that `appearing` gives."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.\d+", path.name):
            path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` under a temporary name beside `path`, then rename. Raises `UserError`."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
