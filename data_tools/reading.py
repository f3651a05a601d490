"""Read the samples of a shard by number, and of a sample what several tools ask for."""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from data_tools.stats.texts import encodable
from siglip_train.data.faults import SampleError
from siglip_train.data.images import MAX_PIXELS, Encoded, without_texts
from siglip_train.data.limits import USUAL_LIMITS
from siglip_train.data.samples import Field
from siglip_train.data.shards import RawSample
from siglip_train.data.tar import TarIndex, member_for_tools

# Pillow names the object in memory that it cannot read: another in every run
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")
_MAX_DETAIL = 200


def read_rows(
    path: Path,
    name: str,
    index: TarIndex,
    rows: Iterable[int],
    longest: int | None = USUAL_LIMITS.member_bytes,
) -> Iterator[RawSample]:
    """Samples of the tar `path` with all their members, named as of shard `name`.

    longest: as `member_for_tools` takes it.
    """
    with path.open("rb") as file:
        for row in rows:
            members = {
                extension: member_for_tools(index, file.fileno(), member, longest)
                for extension, member in index.members(row).items()
            }
            yield RawSample(name, index.key(row), members)


def first_text(fields: Sequence[Field], sample: RawSample) -> str:
    """The first value that is not empty, "" where there is none or the json member is broken."""
    with contextlib.suppress(SampleError):
        return encodable(str(next((value for field in fields if (value := field.first(sample))), "")))
    return ""


def picture_header(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, int, int]:
    """(format, width, height) of a picture without decoding it. Raises `SampleError`."""
    picture = Encoded(data, max_pixels)
    return picture.format, *picture.size


def read_mask(data: bytes) -> Image.Image:
    """A class map, one channel of 8 bits, from a PNG. Raises `SampleError`."""
    try:
        with Image.open(io.BytesIO(without_texts(data)), formats=["PNG"]) as mask:
            if mask.width * mask.height > MAX_PIXELS:
                raise ValueError(f"{mask.width} x {mask.height} pixels, limit {MAX_PIXELS}")
            mask.load()
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
        raise SampleError("broken mask", f"{type(error).__name__}: {error}") from error
    if mask.mode not in ("L", "P"):
        raise SampleError("broken mask", f"mode {mask.mode}, but a class map has one channel of 8 bits")
    return mask


def plain_detail(detail: str) -> str:
    """What an error said, the same in every run and not too long to be listed."""
    return _ADDRESS.sub("", detail)[:_MAX_DETAIL]
