"""Makes the index of a tar from one scan of its headers.

A sample that damage of the tar may have touched is left out, so that no image meets the caption of another.
"""

import itertools
import os
from pathlib import Path

import numpy as np

from siglip_train.data.shards.tar import TarIndex
from siglip_train.data.shards.tar_members import AFTER_THE_END, BrokenTarError, Member, Members

# beside the causes of `Lost`
REPEATED_MEMBER = "repeated member"
# their table takes 150 bytes of memory each; all of ImageNet in one tar has 4 million
_MAX_MEMBERS = 16_000_000


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
