"""Read the samples of a shard by number, and of a sample what several tools ask for."""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from data_tools.stats.texts import encodable
from siglip_train.data.faults import SampleError
from siglip_train.data.images import without_texts
from siglip_train.data.samples import Field
from siglip_train.data.shards import RawSample
from siglip_train.data.tar import TarIndex
from siglip_train.data.tar_members import read_part

# Pillow names the object in memory that it cannot read: another in every run
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")
_MAX_DETAIL = 200


def read_rows(path: Path, name: str, index: TarIndex, rows: Iterable[int]) -> Iterator[RawSample]:
    """Samples of the tar `path` with all their members, named as of shard `name`."""
    with path.open("rb") as file:
        for row in rows:
            members = {
                extension: read_part(file.fileno(), int(index.offsets[member]), int(index.sizes[member]))
                for extension, member in index.members(row).items()
            }
            yield RawSample(name, index.key(row), members)


def first_text(fields: Sequence[Field], sample: RawSample) -> str:
    """The first value that is not empty, "" where there is none or the json member is broken."""
    with contextlib.suppress(SampleError):
        return encodable(str(next((value for field in fields if (value := field.first(sample))), "")))
    return ""


def picture_header(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) of a picture without decoding it. Raises `SampleError`."""
    if not data:
        raise SampleError("empty image", "0 bytes")
    try:
        with Image.open(io.BytesIO(without_texts(data))) as image:
            return image.format or "unknown", *image.size
    except Image.DecompressionBombError as error:
        raise SampleError("image too large", str(error)) from error
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
        raise SampleError("broken image", f"{type(error).__name__}: {error}") from error


def plain_detail(detail: str) -> str:
    """What an error said, the same in every run and not too long to be listed."""
    return _ADDRESS.sub("", detail)[:_MAX_DETAIL]
