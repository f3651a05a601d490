"""Indexes of tars, kept in the cache: a tar is scanned once."""

import contextlib
import hashlib
from dataclasses import fields
from pathlib import Path

import numpy as np

from siglip_train.data.remote.locations import COPIES
from siglip_train.data.shards.scan import scan
from siglip_train.data.shards.tar import TarIndex
from siglip_train.data.shards.tar_members import BrokenTarError
from siglip_train.files.atomic import appearing

# enters the name of a kept index: raise it when its content changes
_INDEX_VERSION = 4


def load_index(path: Path, cache: Path) -> TarIndex:
    """The index of a tar, from `cache` where this very file was scanned before. Raises `BrokenTarError`."""
    try:
        size, file = path.stat().st_size, _kept_file(path, cache)
    except OSError as error:
        raise BrokenTarError(error.strerror) from error
    kept = _read_kept(file)
    if kept is not None and kept.file_size == size:
        return kept
    index = scan(path)
    with contextlib.suppress(OSError):
        _keep(index, file)
    return index


def index_of_copy(path: Path, cache: Path) -> TarIndex | None:
    """The index of a copy in the cache that may be gone, None = it was never scanned."""
    return _read_kept(_kept_file(path, cache))


def identity(path: Path, cache: Path) -> str:
    """What tells this very tar from others and from what it was before; a copy need not be there. Raises `OSError`."""
    if path.parent == cache / COPIES:
        # the name of a copy says which version of which shard it is, and a copy made anew is the same
        return f"{path.name}\0"
    stat = path.stat()
    return f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}"


def _kept_file(path: Path, cache: Path) -> Path:
    content = f"{identity(path, cache)}\0{_INDEX_VERSION}"
    return cache / "indexes" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"


def _read_kept(file: Path) -> TarIndex | None:
    # a damaged or foreign file there costs a scan, nothing else
    with contextlib.suppress(Exception), np.load(file, allow_pickle=False) as arrays:
        return TarIndex(
            **{name: arrays[name] if arrays[name].ndim else arrays[name].item() for name in arrays.files}
        )
    return None


def _keep(index: TarIndex, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with appearing(kept) as partial, partial.open("wb") as file:
        np.savez(file, **{field.name: getattr(index, field.name) for field in fields(index)})
