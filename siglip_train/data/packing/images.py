"""The image and the mask of a sample as they are stored: shrunk or not, as they were or encoded anew."""

import io
from typing import NamedTuple

from PIL import Image

from siglip_train.data.image_file import decode, has_16_bits, without_texts
from siglip_train.data.remote.limits import MAX_PIXELS
from siglip_train.errors import SampleError

FORMATS = ("keep", "jpg", "png", "webp")
Size = tuple[int, int]  # width, height


class ImageOptions(NamedTuple):
    """resize: longest the shorter side may be, pixels. format: one of FORMATS. quality: of jpg and webp.

    grey_bits: those of 16 that grey images use, None = all. max_pixels: of an image as it comes; one with more is
    skipped.
    """

    resize: int | None = None
    format: str = "keep"
    quality: int = 90
    grey_bits: int | None = None
    max_pixels: int = MAX_PIXELS


class PreparedImage(NamedTuple):
    """An encoded image, its extension, and its size before and after shrinking."""

    extension: str
    data: bytes
    size_before: Size
    size: Size


def prepare(data: bytes, options: ImageOptions) -> PreparedImage:
    """Decode an image, shrink and encode it where the options ask for it.

    With "keep" the bytes stay as they are unless the image is shrunk, or of a format that shards do not have
    (it becomes png). What is encoded anew is RGB, without metadata. Raises `SampleError`, also for a JPEG damaged in
    its middle: encoded anew, no one could tell.
    """
    image = decode(data, options.max_pixels, strict=True, grey_bits=options.grey_bits or 16)
    before = image.size
    own = _own_extension(data)
    size = shrunk(before, options.resize)
    is_scaled = options.grey_bits is not None and has_16_bits(data)
    if options.format == "keep" and own and size == before and not is_scaled:
        return PreparedImage(own, data, before, before)
    if size != before:
        image = image.resize(size, Image.Resampling.BICUBIC)  # antialiased by Pillow
    extension = (own or "png") if options.format == "keep" else options.format
    return PreparedImage(extension, _encode(image, extension, options.quality), before, size)


def shrunk(size: Size, shortest_side: int | None) -> Size:
    """The size at which the shorter side is at most `shortest_side`, of the same aspect to the nearest pixel."""
    shorter = min(size)
    if shortest_side is None or shorter <= shortest_side:
        return size
    width, height = (max(1, round(side * shortest_side / shorter)) for side in size)
    return width, height


def prepare_mask(data: bytes, prepared: PreparedImage, *, is_scaled: bool) -> bytes:
    """The class map at the size of its image, by nearest neighbour. Raises `SampleError`.

    is_scaled: it may be of another size than the image, which was shrunk since, as boxes may.
    """
    mask = read_mask(data)
    if mask.size != prepared.size_before and not is_scaled:
        raise SampleError("mask of another size", f"{mask.size}, the image {prepared.size_before}")
    if mask.size == prepared.size:
        return data
    return _encode(mask.resize(prepared.size, Image.Resampling.NEAREST), "png", 0)


def _own_extension(data: bytes) -> str | None:
    """By content: many a file is named .jpg and is none."""
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else None


def _encode(image: Image.Image, extension: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    options = {} if extension == "png" else {"quality": quality}
    # Pillow writes colour profiles and comments from there; a profile made in decoding has the time in it
    image.info = {}
    try:
        image.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **options)
    except (OSError, ValueError) as error:  # WebP has a limit of 16,383 pixels a side
        raise SampleError("cannot be encoded", f"{image.size} as {extension}: {error}") from error
    return buffer.getvalue()


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
