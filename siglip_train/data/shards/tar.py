"""Where the samples of a plain tar lie, and the bytes of their members.

Samples follow the WebDataset convention: adjacent members with the same path up to the first dot of the file name.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from siglip_train.data.remote.limits import USUAL_LIMITS
from siglip_train.data.shards.tar_members import BLOCK, MAX_RECORDS, TRUNCATED
from siglip_train.errors import SampleError


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


def read_part(descriptor: int, offset: int, size: int) -> bytes:
    """The bytes of a member, fewer where the tar has become shorter.

    offset: below 0, that of the list of parts which are no holes, in decimal numbers: how many, then the place and size
    of each; from the next block on stands what is in them (`tar --format=posix -S`). A wrong list gives no bytes.
    """
    if offset >= 0:
        return os.pread(descriptor, size, offset)
    content = bytearray(size)
    try:
        parts, position = _sparse_parts(descriptor, -offset)
        for place, length in parts:
            data = os.pread(descriptor, length, position)
            if len(data) < length or not 0 <= place <= size - length:
                return b""
            content[place : place + length] = data
            position += length
    except ValueError:
        return b""
    return bytes(content)


def _sparse_parts(descriptor: int, offset: int) -> tuple[list[tuple[int, int]], int]:
    """(place, size) of the parts of a file with holes, and where the first of them lies. Raises ValueError."""
    text = os.pread(descriptor, MAX_RECORDS, offset)
    count, _, rest = text.partition(b"\n")
    wanted = 2 * int(count)
    if not 0 <= wanted <= len(rest):
        raise ValueError("the list of parts has no end")
    *numbers, behind = rest.split(b"\n", wanted)
    if len(numbers) < wanted:
        raise ValueError("the list of parts has no end")
    position = offset + (len(text) - len(behind) + BLOCK - 1) // BLOCK * BLOCK
    values = [int(number) for number in numbers]
    return list(zip(values[::2], values[1::2], strict=True)), position
