"""Where the samples of a plain tar lie: an index of offsets from one scan of its headers, kept on disk for reuse.

Samples follow the WebDataset convention: adjacent members with the same path up to the first dot of the file name. A
sample that damage of the tar may have touched is left out, so that no image meets the caption of another.
"""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siglip_train.data.remote.limits import USUAL_LIMITS
from siglip_train.data.remote.locations import COPIES
from siglip_train.data.shards.tar_members import (
    AFTER_THE_END,
    TRUNCATED,
    BrokenTarError,
    Member,
    Members,
    read_part,
)
from siglip_train.errors import SampleError
from siglip_train.files.atomic import appearing

# beside the causes of `Lost`
REPEATED_MEMBER = "repeated member"
# their table takes 150 bytes of memory each; all of ImageNet in one tar has 4 million
_MAX_MEMBERS = 16_000_000
# enters the name of a kept index: raise it when its content changes
_INDEX_VERSION = 4


@dataclass(frozen=True)
class TarIndex:
    """All samples of one tar; n samples, M members.

    extensions: the member kinds. offsets, sizes, kinds: `[M]`, bytes of each member and its place in `extensions`.
    starts: `[n + 1]` first member of each sample. keys, key_ends: the sample names joined, `[n]`.
    torn, torn_causes: `[t]` names of samples left out for damage, "?" = not known, and the short name of each cause.
    repeated: samples whose key came before. file_size: bytes of the whole tar.
    """

    extensions: NDArray[np.str_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    kinds: NDArray[np.int16]
    starts: NDArray[np.int64]
    keys: NDArray[np.bytes_]
    key_ends: NDArray[np.int64]
    torn: NDArray[np.str_]
    torn_causes: NDArray[np.str_]
    repeated: int
    file_size: int

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


def read_member(
    index: TarIndex, descriptor: int, member: int, limit: int = USUAL_LIMITS.member_bytes
) -> bytes:
    """The bytes of a member. Raises `SampleError` for more than `limit`, and where the tar has become shorter."""
    size = int(index.sizes[member])
    if size > limit:
        raise SampleError("member too large", f"{size} bytes, limit {limit} (data.max_member_mib)")
    data = read_part(descriptor, int(index.offsets[member]), size)
    if len(data) < size:
        raise SampleError(TRUNCATED, f"{len(data)} of {size} bytes")
    return data


def member_for_tools(
    index: TarIndex, descriptor: int, member: int, limit: int | None = USUAL_LIMITS.member_bytes
) -> bytes:
    """What is there of a member, up to `limit` bytes, None = all; one that is cut is broken to whoever decodes it."""
    size = int(index.sizes[member])
    return read_part(descriptor, int(index.offsets[member]), size if limit is None else min(size, limit))


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


class _Builder:
    """Collects members into samples."""

    def __init__(self) -> None:
        self.kinds: dict[bytes, int] = {}
        self.rows: list[tuple[int, int, int]] = []
        self.starts: list[int] = []
        self.keys: list[bytes] = []
        self.seen: set[bytes] = set()
        self.repeated = 0
        self.torn: list[tuple[bytes, str]] = []
        self._extensions: set[bytes] = set()
        self._lost = b""

    def add(self, name: bytes, offset: int, size: int) -> None:
        key, extension = split_name(name)
        if not key or key == self._lost:
            return
        self._lost = b""
        if not self.keys or key != self.keys[-1] or extension in self._extensions:
            self.repeated += key in self.seen
            self.seen.add(key)
            self.keys.append(key)
            self.starts.append(len(self.rows))
            self._extensions = set()
        self._extensions.add(extension)
        self.rows.append((offset, size, self.kinds.setdefault(extension, len(self.kinds))))

    def lose(self, name: bytes, cause: str) -> None:
        """Leave out the sample of a member; where it is not known, the sample before, whose end may be damaged too."""
        self._lost = split_name(name)[0]
        if self.keys and self._lost in (b"", self.keys[-1]) and cause != AFTER_THE_END:
            self._lost = self.keys.pop()
            del self.rows[self.starts.pop() :]
        self.torn.append((self._lost or b"?", cause))

    def drop_mixed(self) -> None:
        """Leave out neighbours of one key and different members: one may have a member whose damaged name became its.

        (Long names and pax records have no checksum.)
        """
        ends = [*self.starts[1:], len(self.rows)]
        mixed: set[int] = set()
        for sample in range(1, len(self.keys)):
            if self.keys[sample] == self.keys[sample - 1]:
                pair = (sample - 1, sample)
                one, other = ({row[2] for row in self.rows[self.starts[i] : ends[i]]} for i in pair)
                mixed.update(pair if one != other else ())
        self.torn += [(self.keys[sample], REPEATED_MEMBER) for sample in sorted(mixed)]
        if mixed:
            self._keep([sample for sample in range(len(ends)) if sample not in mixed], ends)

    def _keep(self, samples: list[int], ends: list[int]) -> None:
        rows = [self.rows[self.starts[sample] : ends[sample]] for sample in samples]
        self.keys = [self.keys[sample] for sample in samples]
        self.starts = [0, *itertools.accumulate(map(len, rows))][:-1]
        self.rows = list(itertools.chain.from_iterable(rows))

    def build(self, size: int) -> TarIndex:
        table = np.array(self.rows, dtype=np.int64).reshape(-1, 3)
        return TarIndex(
            extensions=np.array([kind.decode("utf-8", "replace") for kind in self.kinds], dtype=np.str_),
            offsets=table[:, 0].copy(),
            sizes=table[:, 1].copy(),
            kinds=table[:, 2].astype(np.int16),
            starts=np.array([*self.starts, len(self.rows)], dtype=np.int64),
            keys=np.frombuffer(b"".join(self.keys), dtype="S1"),
            key_ends=np.cumsum([len(key) for key in self.keys], dtype=np.int64),
            torn=np.array([key.decode("utf-8", "replace") for key, _ in self.torn], dtype=np.str_),
            torn_causes=np.array([cause for _, cause in self.torn], dtype=np.str_),
            repeated=self.repeated,
            file_size=size,
        )


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """Member name to (key, lower-case extension) at the first dot of its last part; no key for hidden files."""
    begin = name.rfind(b"/") + 1
    dot = name.find(b".", begin)
    return (name[:dot], name[dot + 1 :].lower()) if dot > begin else (b"", b"")


def scan(path: Path) -> TarIndex:
    """Read the headers of a tar. Samples that damage may have touched are left out and named in `torn`.

    Raises `BrokenTarError` where there is not a single header.
    """
    builder = _Builder()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BrokenTarError(error.strerror) from error
    try:
        end = os.fstat(descriptor).st_size
        for found in Members(descriptor, end):
            if isinstance(found, Member):
                builder.add(*found)
                if len(builder.rows) > _MAX_MEMBERS:
                    raise BrokenTarError(f"it holds more than {_MAX_MEMBERS:,} members: split it")
            else:
                builder.lose(*found)
    except OSError as error:
        raise BrokenTarError(error.strerror) from error
    finally:
        os.close(descriptor)
    builder.drop_mixed()
    return builder.build(end)
