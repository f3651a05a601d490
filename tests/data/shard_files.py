"""Writes tar shards member by member."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from siglip_train.data.shards.manifest import Entry, index_content, members_of
from siglip_train.data.shards.scan import scan
from tests.data.conftest import encoded, picture

Member = tuple[str, bytes]


def sample(key: str, number: int = 0, **members: bytes) -> list[Member]:
    """A complete sample `key` with `caption <number>`; keywords add or replace members, b"" removes none."""
    content = {
        "png": encoded(picture(number)),
        "txt": f"caption {number}".encode(),
        "json": json.dumps({"number": number}).encode(),
        **members,
    }
    return [(f"{key}.{extension}", data) for extension, data in content.items()]


def without(members: list[Member], extension: str) -> list[Member]:
    """The sample less one member."""
    return [member for member in members if not member[0].endswith(f".{extension}")]


def sparse_member(name: str, more: int = 0) -> bytes:
    """A file of 600 bytes as `tar --format=gnu -S` writes one with holes, with so many blocks of its list behind."""
    info = tarfile.TarInfo(name)
    info.type, info.size = b"S", 600
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = more > 0
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    blocks = b"".join(b"1" * 504 + bytes([goes_on]) + b"\0" * 7 for goes_on in range(more)[::-1])
    return bytes(header) + blocks + b"z" * 600 + b"\0" * 424


def write_tar(path: Path, members: Iterable[Member], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A plain tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: list[int]) -> str:
    """Shards 00000.tar, ... of so many samples, keyed by a running number; gives the glob that matches them."""
    number = 0
    for shard, size in enumerate(sizes):
        rows = [sample(f"{number + i:05d}", number + i) for i in range(size)]
        write_tar(folder / f"{shard:05d}.tar", [member for row in rows for member in row])
        number += size
    return str(folder / "*.tar")


def write_index(folder: Path) -> None:
    """The index.json of the shards in a folder."""
    entries = []
    for path in sorted(folder.glob("*.tar")):
        index, data = scan(path), path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        entries.append(Entry(path.name, len(data), digest, len(index), len(index), members_of(index)))
    (folder / "index.json").write_text(json.dumps(index_content(entries)))
