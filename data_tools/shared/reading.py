"""Read the samples of a shard by number, and of a sample what several tools ask for."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_tools.stats.texts import encodable
from siglip_train.data.image_file import Encoded
from siglip_train.data.remote.limits import MAX_PIXELS, USUAL_LIMITS
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample
from siglip_train.data.shards.tar import TarIndex, member_for_tools
from siglip_train.errors import SampleError


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


def image_header(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, int, int]:
    """(format, width, height) of an image without decoding it. Raises `SampleError`."""
    image = Encoded(data, max_pixels)
    return image.format, *image.size
