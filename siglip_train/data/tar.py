"""Where the samples of a plain tar lie: an index of offsets from one scan of its headers, kept on disk for reuse.

Samples follow the WebDataset convention: adjacent members with the same path up to the first dot of the file name.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BLOCK = 512
_FILE_TYPES = (b"0", b"\0", b"7")
# the folder of the cache where copies of shards lie
COPIES = "copies"
# enters the name of a kept index: raise it when its content changes
_INDEX_VERSION = 3


class BrokenTarError(Exception):
    """The file is no tar at all, or cannot be read."""


class _TornError(Exception):
    """The tar ends, or turns into rubbish, inside the member of this name (b"" = unknown)."""

    def __init__(self, name: bytes) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class TarIndex:
    """All samples of one tar; n samples, M members.

    extensions: the member kinds. offsets, sizes, kinds: `[M]`, bytes of each member and its place in `extensions`.
    starts: `[n + 1]` first member of each sample. keys, key_ends: the sample names joined, `[n]`.
    torn: names of samples that the damaged end of the tar has cut. repeated: samples whose key came before.
    bytes: of the whole file.
    """

    extensions: NDArray[np.str_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    kinds: NDArray[np.int16]
    starts: NDArray[np.int64]
    keys: NDArray[np.bytes_]
    key_ends: NDArray[np.int64]
    torn: NDArray[np.str_]
    repeated: int
    bytes: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def key(self, sample: int) -> str:
        """Name of a sample: the path of its members up to the first dot."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes().decode("utf-8", "replace")

    def members(self, sample: int) -> dict[str, int]:
        """Extension -> member of a sample."""
        members = range(int(self.starts[sample]), int(self.starts[sample + 1]))
        return {str(self.extensions[self.kinds[member]]): member for member in members}

    def find(self, extensions: Sequence[str]) -> NDArray[np.int64]:
        """`[n]` the member that has the first of `extensions` each sample has, -1 = none."""
        found = np.full(len(self), -1, dtype=np.int64)
        for extension in reversed(extensions):
            (kind,) = np.nonzero(self.extensions == extension)
            (members,) = np.nonzero(np.isin(self.kinds, kind))
            found[np.searchsorted(self.starts, members, side="right") - 1] = members
        return found


def load_index(path: Path, cache: Path) -> TarIndex:
    """The index of a tar, from `cache` where this very file was scanned before. Raises `BrokenTarError`."""
    try:
        stat = path.stat()
    except OSError as error:
        raise BrokenTarError(error.strerror) from error
    file = _kept_file(path, cache, f"{stat.st_size}\0{stat.st_mtime_ns}")
    kept = _read_kept(file)
    if kept is not None and kept.bytes == stat.st_size:
        return kept
    index = scan(path)
    with contextlib.suppress(OSError):
        _keep(index, file)
    return index


def index_of_copy(path: Path, cache: Path) -> TarIndex | None:
    """The index of a copy in the cache that may be gone, None = it was never scanned."""
    return _read_kept(_kept_file(path, cache, ""))


def _kept_file(path: Path, cache: Path, version: str) -> Path:
    # the name of a copy says which version of which shard it is, and a copy made anew is the same
    is_copy = path.parent == cache / COPIES
    identity = f"{path.name if is_copy else path.absolute()}\0{'' if is_copy else version}\0{_INDEX_VERSION}"
    return cache / "indexes" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"


def _read_kept(file: Path) -> TarIndex | None:
    # a damaged or foreign file there costs a scan, nothing else
    with contextlib.suppress(Exception), np.load(file, allow_pickle=False) as arrays:
        return TarIndex(
            **{name: arrays[name] if arrays[name].ndim else arrays[name].item() for name in arrays.files}
        )
    return None


def _keep(index: TarIndex, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".npz", delete=False) as temporary:
        np.savez(temporary, **{field.name: getattr(index, field.name) for field in fields(index)})
    os.replace(temporary.name, kept)


class _Builder:
    """Collects members into samples."""

    def __init__(self) -> None:
        self.kinds: dict[bytes, int] = {}
        self.rows: list[tuple[int, int, int]] = []
        self.starts: list[int] = []
        self.keys: list[bytes] = []
        self.seen: set[bytes] = set()
        self.repeated = 0
        self._extensions: set[bytes] = set()

    def add(self, name: bytes, offset: int, size: int) -> None:
        key, extension = split_name(name)
        if not key:
            return
        if not self.keys or key != self.keys[-1] or extension in self._extensions:
            self.repeated += key in self.seen
            self.seen.add(key)
            self.keys.append(key)
            self.starts.append(len(self.rows))
            self._extensions = set()
        self._extensions.add(extension)
        self.rows.append((offset, size, self.kinds.setdefault(extension, len(self.kinds))))

    def drop_last(self) -> None:
        del self.rows[self.starts.pop() :]
        self.keys.pop()

    def build(self, torn: list[str], size: int) -> TarIndex:
        table = np.array(self.rows, dtype=np.int64).reshape(-1, 3)
        return TarIndex(
            extensions=np.array([kind.decode("utf-8", "replace") for kind in self.kinds], dtype=np.str_),
            offsets=table[:, 0].copy(),
            sizes=table[:, 1].copy(),
            kinds=table[:, 2].astype(np.int16),
            starts=np.array([*self.starts, len(self.rows)], dtype=np.int64),
            keys=np.frombuffer(b"".join(self.keys), dtype="S1"),
            key_ends=np.cumsum([len(key) for key in self.keys], dtype=np.int64),
            torn=np.array(torn, dtype=np.str_),
            repeated=self.repeated,
            bytes=size,
        )


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """Member name to (key, lower-case extension) at the first dot of its last part; no key for hidden files."""
    begin = name.rfind(b"/") + 1
    dot = name.find(b".", begin)
    return (name[:dot], name[dot + 1 :].lower()) if dot > begin else (b"", b"")


def scan(path: Path) -> TarIndex:
    """Read the headers of a tar. Complete members before a damage are kept, the torn sample is left out.

    Raises `BrokenTarError` where not even the first header is one.
    """
    builder, torn = _Builder(), []
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BrokenTarError(error.strerror) from error
    try:
        end = os.fstat(descriptor).st_size
        for name, offset, size in _members(descriptor, end):
            builder.add(name, offset, size)
    except (_TornError, ValueError) as error:
        key = split_name(error.name)[0] if isinstance(error, _TornError) else b""
        if builder.keys and key in (b"", builder.keys[-1]):
            key = builder.keys[-1]
            builder.drop_last()
        torn.append(key.decode("utf-8", "replace") or "?")
    except OSError as error:
        raise BrokenTarError(error.strerror) from error
    finally:
        os.close(descriptor)
    return builder.build(torn, end)


def _members(descriptor: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of every regular file: ustar, GNU long names, pax."""
    position, given_name, given_size = 0, b"", -1
    while position < end:
        header = os.pread(descriptor, _BLOCK, position)
        if not header.strip(b"\0"):
            return
        if not _is_header(header):
            if position == 0:
                raise BrokenTarError("it is no tar file")
            raise _TornError(b"")
        size = given_size if given_size >= 0 else _number(header[124:136])
        kind, data = header[156:157], position + _BLOCK
        name = given_name or _name(header)
        if data + size > end:
            raise _TornError(name if kind in _FILE_TYPES else b"")
        if kind == b"L":
            given_name = os.pread(descriptor, size, data).rstrip(b"\0")
        elif kind == b"x":
            records = _pax(os.pread(descriptor, size, data))
            given_name, given_size = records.get(b"path", b""), int(records.get(b"size", -1))
        elif kind not in (b"g", b"K"):
            if kind in _FILE_TYPES:
                yield name, data, size
            given_name, given_size = b"", -1
        position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _is_header(header: bytes) -> bool:
    if len(header) < _BLOCK:
        return False
    if header[257:262] == b"ustar":
        return True
    # the oldest format has no magic: its checksum counts its own field as spaces
    try:
        return _number(header[148:156]) == sum(header[:148]) + sum(header[156:]) + 8 * 32
    except ValueError:
        return False


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        # base 256, for members beyond 8 GiB
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(data: bytes) -> dict[bytes, bytes]:
    records = {}
    while data:
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        records[key] = value
        data = data[length:]
    return records
