"""Small files that claim gigabytes, and what a stranger's shard may hold beside them."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

from PIL import Image

from tests.data.conftest import encoded, picture


def png(width: int, height: int, extra: bytes = b"", colour_type: int = 2, rows: int | None = None) -> bytes:
    """A PNG of one colour, a thousandth of its pixels in bytes.

    extra: chunks before the pixels. rows: that are there, None = all.
    """
    bytes_per_pixel = {2: 3, 6: 4}[colour_type]
    packer, row = zlib.compressobj(9), bytes(1 + width * bytes_per_pixel)
    pixels = b"".join(packer.compress(row) for _ in range(rows or height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def text_chunk(size: int) -> bytes:
    """A compressed text that unpacks to `size` bytes."""
    packer = zlib.compressobj(9)
    part = bytes(1 << 20)
    packed = b"".join(packer.compress(part) for _ in range(size >> 20)) + packer.flush()
    return chunk(b"zTXt", b"Comment\0\0" + packed)


def webp_animation(side: int) -> bytes:
    """Two frames of 64 pixels on a canvas of `side`."""
    stored = io.BytesIO()
    first, *others = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first.save(stored, "WEBP", save_all=True, append_images=others, lossless=True)
    data = bytearray(stored.getvalue())
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = struct.pack("<I", side - 1)[:3] * 2
    return bytes(data)


def gif(side: int) -> bytes:
    """A GIF whose screen has that side, and its frame one pixel."""
    stored = io.BytesIO()
    Image.new("P", (1, 1)).save(stored, "GIF")
    data = bytearray(stored.getvalue())
    data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)


def gif_frame(side: int) -> bytes:
    """A GIF whose screen is one pixel, and its frame has that side."""
    data = bytearray(gif(1))
    place = data.index(b",", 13) + 5
    data[place : place + 4] = struct.pack("<HH", side, side)
    return bytes(data)


def jpeg_of_scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan is repeated: each goes over the whole image."""
    stored = io.BytesIO()
    Image.new("RGB", (side, side)).save(stored, "JPEG", progressive=True)
    data = stored.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def icon(side: int) -> bytes:
    """An ICO that says 16 x 16, and holds a PNG of that side."""
    inside = png(side, side)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22) + inside


def gzip_of_zeros(path: Path, megabytes: int, begin: bytes = b"") -> Path:
    """A gzip stream of `begin` and so many MB of zeros, a thousandth of that in size."""
    packer, part = zlib.compressobj(9, wbits=31), bytes(1 << 20)
    with path.open("wb") as file:
        file.write(packer.compress(begin))
        for _ in range(megabytes):
            file.write(packer.compress(part))
        file.write(packer.flush())
    return path


def tar_with_a_huge_member(path: Path, key: str, gigabytes: float) -> Path:
    """A good sample, then one whose image is so large; the file is sparse and takes no room."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            (f"{key}.png", encoded(picture())),
            (f"{key}.txt", b"a good one"),
            (f"{key}1.txt", b"large"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo(f"{key}1.png")
        info.size = int(gigabytes * 2**30)
        header = info.tobuf(tarfile.PAX_FORMAT)
        end = tar.offset
    with path.open("r+b") as file:
        file.seek(end)
        file.write(header)
        file.truncate(end + len(header) + -(-info.size // 512) * 512 + 1024)
    return path
