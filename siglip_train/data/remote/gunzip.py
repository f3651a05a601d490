"""Unpack gzip streams, also damaged ones as far as they go."""

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from siglip_train.data.remote.limits import USUAL_LIMITS, Limits, OversizedError

_MAGIC = b"\x1f\x8b"
# of the packed stream at a time, which unpacks to a thousand times as much at most
_CHUNK = 1 << 14
# zlib's code for "a gzip header and the largest window"
_GZIP = 31


class _Out(Protocol):
    def write(self, data: bytes) -> Any: ...


class _Counted:
    def __init__(self, out: _Out, limit: int, refusal: str) -> None:
        self._out, self._left, self._refusal = out, limit, refusal

    def write(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise OversizedError(self._refusal)
        self._out.write(data)


def is_gzip(path: Path) -> bool:
    """Does the file begin as gzip streams do?"""
    with path.open("rb") as stream:
        return stream.read(2) == _MAGIC


def gunzip(path: Path, out: _Out, limits: Limits = USUAL_LIMITS) -> bool:
    """Write what is in one gzip stream, or several in a row; False where it is damaged or breaks off.

    Raises `OversizedError` before more is written than the limits allow.
    """
    size = path.stat().st_size
    out = _Counted(out, limits.unpacked(size), limits.refusal(size))
    unpacker = zlib.decompressobj(wbits=_GZIP)
    for chunk in _chunks(path):
        data = chunk
        while data:
            if unpacker.eof:
                unpacker = zlib.decompressobj(wbits=_GZIP)
            before = unpacker.copy()
            try:
                out.write(unpacker.decompress(data))
            except zlib.error:
                _salvage(before, data, out)
                return False
            # what follows the end of a stream; zeros are padding
            data = unpacker.unused_data.lstrip(b"\0")
    return unpacker.eof


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while data := stream.read(_CHUNK):
            yield data


def _salvage(unpacker: Any, data: bytes, out: _Out) -> None:
    """Byte by byte up to the damage, because zlib gives nothing of the call in which it meets one."""
    with contextlib.suppress(zlib.error):
        for position in range(len(data)):
            out.write(unpacker.decompress(data[position : position + 1]))
