"""Whether a folder holds what was written to it: `manifest.json`, written last, has size and SHA-256 of each file."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from siglip_train.errors import UserError
from siglip_train.files.atomic import flush, write_text

MANIFEST = "manifest.json"
# of files at once: SHA-256 takes 1 to 2 GB/s of a core, and Python's lock is not held
_THREADS = 4


class Facts(NamedTuple):
    """A file as it was written."""

    bytes: int
    sha256: str


class Seal:
    """Takes down the files of a folder, in threads, while others are being written. See `sealing`."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._pool = pool
        self._facts: dict[str, Future[Facts]] = {}

    def add(self, path: Path) -> None:
        """A file that is complete, or a folder of such; it is on the disk before the folder is sealed."""
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                name = file.relative_to(self._folder).as_posix()
                self._facts[name] = self._pool.submit(_take_down, file)

    def close(self) -> None:
        """Write the manifest. Raises `OSError` where a file could not be read or flushed."""
        files = {name: future.result()._asdict() for name, future in sorted(self._facts.items())}
        write_text(self._folder / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1) + "\n")


@contextmanager
def sealing(folder: Path) -> Iterator[Seal]:
    """Give the `Seal` of a folder that is written in the block; at its end the manifest is written."""
    with ThreadPoolExecutor(_THREADS) as pool:
        seal = Seal(folder, pool)
        yield seal
        seal.close()


def _take_down(file: Path) -> Facts:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = stream.tell()
    flush(file)
    return Facts(size, digest)


def read_manifest(folder: Path) -> dict[str, Facts] | None:
    """The files that were written to `folder`; None where it has no manifest. Raises `ValueError` for a damaged one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        return {
            name: Facts(int(facts["bytes"]), str(facts["sha256"])) for name, facts in content["files"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({type(error).__name__})") from None


def fingerprint(folder: Path) -> str:
    """Equal for equal folders: a digest of the manifest, or without one of the names and sizes of the files."""
    path = folder / MANIFEST
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def damage(folder: Path, within: str = "") -> str | None:
    """The first file of a folder that is not as it was written, and how; None where all are, or there is no manifest.

    within: the beginning of the names of the files to look at. Files that the manifest does not name do no harm.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    manifest = {name: facts for name, facts in (manifest or {}).items() if name.startswith(within)}
    # sizes first, as they cost nothing
    for name, facts in manifest.items():
        wrong = _wrong_size(folder / name, name, facts)
        if wrong is not None:
            return wrong
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_sha256, [folder / name for name in manifest])
        for (name, facts), digest in zip(manifest.items(), digests, strict=True):
            if digest != facts.sha256:
                return f"{name} is not as it was written (its SHA-256 differs)"
    return None


def check(folder: Path, within: str = "") -> None:
    """Raise a `UserError` where `damage` finds some."""
    found = damage(folder, within)
    if found is not None:
        raise UserError(f"{folder} is damaged: {found}; copy it again, or use another checkpoint")


def _wrong_size(path: Path, name: str, facts: Facts) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    return None if size == facts.bytes else f"{name} has {size} bytes, not {facts.bytes}"


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        # as good as another content
        return None
