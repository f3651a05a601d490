"""Reads the headers of a plain tar: ustar, GNU long names, pax, sparse files. Damage is reported and skipped.

The checksum of every header is compared. Where it is wrong, reading goes on at the next header whose checksum is right.
"""

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
_FILE_TYPES = (b"0", b"\0", b"7")
# a GNU long name and pax records, of the member that follows
_RECORDS = (b"L", b"x")
_MAGIC, _MAGIC_AT = b"ustar", 257
# a file with holes, in GNU's own form: more headers may follow it, and no pax records say so
_OLD_SPARSE = b"S"
# why something was lost
TRUNCATED, BROKEN_HEADER, AFTER_THE_END = "truncated", "broken header", "data after the end"
SPARSE = "file with holes"
# of a file with holes, all in all: the holes cost nothing in the tar, and everything in memory
_MAX_SPARSE = 1 << 28
# the largest prime below 2^16, modulo which Adler-32 sums
_ADLER = 65_521
# a long name or pax records, bytes; a wrong size may claim all that follows
MAX_RECORDS = 1 << 20
# what does not fit into 11 octal digits stands in a pax record
_LARGE = 8**11
_CHUNK = 1 << 20


class BrokenTarError(Exception):
    """The file is no tar at all, or cannot be read."""


class Member(NamedTuple):
    """A regular file: `size` bytes from `offset`, as `read_part` takes them."""

    name: bytes
    offset: int
    size: int


class Lost(NamedTuple):
    """Something that cannot be read. name: of the member, right or wrong; b"" = not known. cause: as it is counted."""

    name: bytes
    cause: str


class _Given(NamedTuple):
    """What records in front of a header say of its member; is_broken: they cannot be read.

    real_size: with its holes, -1 = it has none.
    """

    name: bytes = b""
    size: int = -1
    is_broken: bool = False
    real_size: int = -1


_NOTHING = _Given()


class Members:
    """Iterates over the regular files of a tar of `end` bytes.

    Raises `BrokenTarError` where there is not a single header, and OSError.
    """

    def __init__(self, descriptor: int, end: int) -> None:
        self._descriptor, self._end = descriptor, end
        self._position, self._given = 0, _NOTHING

    def __iter__(self) -> Iterator[Member | Lost]:
        while self._position < self._end:
            header = os.pread(self._descriptor, BLOCK, self._position)
            found = self._member(header) if is_header(header) else self._damage(header)
            if found is not None:
                yield found
        if self._given.is_broken:
            yield Lost(b"", BROKEN_HEADER)

    def _go_on(self, position: int, given: _Given = _NOTHING) -> None:
        self._position, self._given = position, given

    def _member(self, header: bytes) -> Member | Lost | None:
        """What a header stands before; None for all that is no regular file."""
        kind, data, given = header[156:157], self._position + BLOCK, self._given
        is_file = kind in (*_FILE_TYPES, _OLD_SPARSE)
        name = (given.name or _name(header)) if is_file else b""
        size = _size(header, given)
        if not 0 <= size <= self._end - data:
            self._go_on(self._next_header(data))
            return Lost(name, TRUNCATED)
        behind = data + (size + BLOCK - 1) // BLOCK * BLOCK
        if is_file:
            more = self._more_headers(data, header[482:483]) if kind == _OLD_SPARSE else 0
            self._go_on(behind + BLOCK * more)
            return _found(Member(name, data, size), given, is_readable=kind != _OLD_SPARSE)
        if kind in _RECORDS:
            records = os.pread(self._descriptor, min(size, MAX_RECORDS), data)
            self._go_on(behind, _records(kind, records, size))
            # the member that the records before these belong to is gone as well
            return Lost(b"", BROKEN_HEADER) if given.is_broken else None
        self._go_on(behind, given if kind in (b"g", b"K") else _NOTHING)
        return None

    def _more_headers(self, data: int, goes_on: bytes) -> int:
        """How many blocks between a header of GNU's sparse form and the data go on with its list of parts."""
        count = 0
        while goes_on not in (b"", b"\0"):
            goes_on = os.pread(self._descriptor, BLOCK, data + BLOCK * count)[504:505]
            count += 1
        return count

    def _damage(self, header: bytes) -> Lost | None:
        """What stands where no header is."""
        if self._is_end(header):
            is_all = self._is_zero_from(self._position)
            self._go_on(self._end)
            return None if is_all else Lost(b"", AFTER_THE_END)
        found = self._next_header(self._position + 1)
        if self._position == 0 and found == self._end:
            raise BrokenTarError("it is no tar file")
        has_magic = header[_MAGIC_AT:].startswith(_MAGIC)
        if has_magic and header[156:157] in _RECORDS:
            # without its long name or records, the member that follows would go by a wrong name
            self._go_on(found, _Given(is_broken=True))
            return None
        self._go_on(found)
        return Lost(_name(header), BROKEN_HEADER) if has_magic else Lost(b"", TRUNCATED)

    def _is_end(self, header: bytes) -> bool:
        """Two blocks of zeros, or what the file has of them."""
        return not header.strip(b"\0") and not os.pread(
            self._descriptor, BLOCK, self._position + BLOCK
        ).strip(b"\0")

    def _is_zero_from(self, position: int) -> bool:
        while chunk := os.pread(self._descriptor, _CHUNK, position):
            if chunk.strip(b"\0"):
                return False
            position += len(chunk)
        return True

    def _next_header(self, position: int) -> int:
        """Where the first header at or after `position` begins, the end where there is none. Old ones are not found."""
        while position < self._end:
            chunk = os.pread(self._descriptor, _CHUNK + BLOCK, position)
            at = chunk.find(_MAGIC, _MAGIC_AT)
            while at >= 0:
                if is_header(chunk[at - _MAGIC_AT : at - _MAGIC_AT + BLOCK]):
                    return position + at - _MAGIC_AT
                at = chunk.find(_MAGIC, at + 1)
            position += _CHUNK
        return self._end


def is_header(block: bytes) -> bool:
    """Does the checksum fit? Its own field counts as spaces, and old tars sum signed bytes."""
    if len(block) < BLOCK:
        return False
    try:
        stored = _number(block[148:156])
    except ValueError:
        return False
    # the low half of Adler-32 is 1 and the sum of bytes modulo 65,521, ten times as fast as sum()
    excess = stored + 1 - 8 * ord(" ") - (zlib.adler32(block[156:], zlib.adler32(block[:148])) & 0xFFFF)
    if excess % _ADLER == 0:
        return True
    negative = sum(byte > 127 for byte in block[:148] + block[156:])
    return negative > 0 and (excess + 256 * negative) % _ADLER == 0


def _found(member: Member, given: _Given, *, is_readable: bool) -> Member | Lost:
    """A regular file, or why it cannot be read."""
    if given.is_broken:
        return Lost(member.name, BROKEN_HEADER)
    if not is_readable or given.real_size > _MAX_SPARSE:
        return Lost(member.name, SPARSE)
    return member if given.real_size < 0 else Member(member.name, -member.offset, given.real_size)


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        # base 256, for members beyond 8 GiB
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _size(header: bytes, given: _Given) -> int:
    """Bytes of the member, -1 where they are not known."""
    try:
        size = _number(header[124:136])
    except ValueError:
        return -1
    # records have no checksum: they are believed where the header has no room for the number, or says the same
    if given.size in (-1, size):
        return size
    return given.size if given.size >= _LARGE else -1


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _records(kind: bytes, data: bytes, size: int) -> _Given:
    """What a GNU long name, or pax records, of `size` bytes say."""
    if len(data) < size:
        return _Given(is_broken=True)
    if kind == b"L":
        return _Given(data.rstrip(b"\0"))
    try:
        records = _pax(data)
        real_size = int(records.get(b"GNU.sparse.realsize", -1)) if b"GNU.sparse.major" in records else -1
        # the name in the header, and in path, is one that tells readers who know no holes
        name = records.get(b"GNU.sparse.name") or records.get(b"path", b"")
        return _Given(name, int(records.get(b"size", -1)), real_size=real_size)
    except ValueError:
        return _Given(is_broken=True)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Records `length key=value\\n`. Raises ValueError."""
    records = {}
    while data:
        digits, _, rest = data.partition(b" ")
        length = int(digits)
        record, ends = rest[: length - len(digits) - 1], data[length - 1 : length]
        key, equals, value = record[:-1].partition(b"=")
        if length <= len(digits) or ends != b"\n" or not equals:
            raise ValueError(f"pax records turn into rubbish at {data[:20]!r}")
        records[key] = value
        data = data[length:]
    return records
