"""From the bytes of an image file to RGB pixels: any common format, whatever is wrong with it told by name."""

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_train.data.remote.limits import MAX_PIXELS
from siglip_train.errors import SampleError

try:
    import simplejpeg
except ImportError:
    # optional: the same libjpeg-turbo as Pillow's, with less work around it
    simplejpeg = None

# the marker of a scan: each goes over the whole image, and takes a few bytes; cameras and editors write at most 20
_SCAN, _MAX_SCANS = b"\xff\xda", 200
# first bytes of the common formats: otherwise Pillow tries half a dozen plugins on every image
_MAGIC = ((b"\xff\xd8", "JPEG"), (b"\x89PNG", "PNG"), (b"RIFF", "WEBP"), (b"BM", "BMP"))
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


class Encoded:
    """An image whose `size` (width, height) is known and whose pixels are decoded, once, when they are asked for.

    strict: refuse too a JPEG in whose data libjpeg lost its way, which it fills with grey or streaks, as training and
    `siglip-data` do; evaluation takes it, as others' does. Only simplejpeg tells, so that nothing changes without it,
    nor for CMYK. Raises `SampleError` for what cannot be decoded completely
    and for more than `max_pixels` pixels, before they take memory. grey_bits: those of 16 that grey images use.
    """

    def __init__(
        self, data: bytes, max_pixels: int = MAX_PIXELS, *, strict: bool = False, grey_bits: int = 16
    ) -> None:
        if not data:
            raise SampleError("empty image", "0 bytes")
        self._data = without_texts(data)
        self._grey_bits = grey_bits
        self._strict = strict
        self._by_pillow: Image.Image | None = None
        self.size = _turbo_size(data) or self._opened().size
        width, height = self.size
        if width * height > max_pixels:
            raise SampleError("image too large", f"{width} x {height} pixels, limit {max_pixels}")
        if data.startswith(b"\xff\xd8") and data.count(_SCAN) > _MAX_SCANS:
            raise SampleError("image too large", f"a JPEG of more than {_MAX_SCANS} scans")

    @property
    def format(self) -> str:
        """Pillow's name of it."""
        return self._opened().format or "unknown"

    def image(self) -> Image.Image:
        """The image in RGB."""
        decoded = self._decoded(1)
        return decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded)

    def pixels(self, divisor: Literal[1, 2, 4, 8] = 1) -> NDArray:
        """uint8 `[H, W, 3]`; a JPEG with its sides divided and rounded up, other formats as they are.

        A JPEG is stored in blocks of frequencies, and the low ones alone give the smaller image: less work, and
        the same pixels from both decoders.
        """
        decoded = self._decoded(divisor)
        return np.array(decoded) if isinstance(decoded, Image.Image) else decoded

    def _decoded(self, divisor: int) -> Image.Image | NDArray:
        width, height = self.size
        if self._by_pillow is None:
            least = {"min_width": -(-width // divisor), "min_height": -(-height // divisor)}
            try:
                return simplejpeg.decode_jpeg(self._data, **least)
            except ValueError as error:
                # also said of odd but readable files, which are Pillow's to judge
                if self._strict and _is_damage(str(error)):
                    raise SampleError("damaged picture data", str(error)) from error
        image = self._opened()
        with _broken_image():
            image.draft("RGB", (width // divisor, height // divisor))
            image.load()
            return to_rgb(image, self._grey_bits)

    def _opened(self) -> Image.Image:
        if self._by_pillow is None:
            with _broken_image():
                self._by_pillow = Image.open(io.BytesIO(self._data), formats=_formats(self._data))
        return self._by_pillow


def decode(
    data: bytes, max_pixels: int = MAX_PIXELS, *, strict: bool = False, grey_bits: int = 16
) -> Image.Image:
    """Decode JPEG, PNG, WebP, ... to an RGB image.

    Transparent pixels are put over white; 16-bit grey keeps its upper 8 of `grey_bits` bits; CMYK, palettes and 1-bit
    follow Pillow. The EXIF orientation is ignored, as the published models' pipelines do.
    Raises `SampleError` as `Encoded` does, which also says what `strict` means.
    """
    return Encoded(data, max_pixels, strict=strict, grey_bits=grey_bits).image()


def without_texts(data: bytes) -> bytes:
    """A PNG without the texts beside its pixels, of which Pillow refuses much; anything else as it is."""
    if not data.startswith(b"\x89PNG") or not any(kind in data for kind in _PNG_TEXTS[1:]):
        return data
    parts, position = [data[:8]], 8
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        if data[position + 4 : position + 8] not in _PNG_TEXTS:
            parts.append(data[position:end])
        position = end
    return b"".join(parts)


def has_16_bits(data: bytes) -> bool:
    """Is it a PNG with 16 bits a channel?"""
    return data.startswith(b"\x89PNG") and data[24:25] == b"\x10"


def _turbo_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of what simplejpeg can decode, None for the rest, which is Pillow's."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colorspace in ("CMYK", "YCCK") else (width, height)


def _is_damage(complaint: str) -> bool:
    """Does libjpeg say that pixels are wrong? What stands between the parts of a file may be a camera's padding."""
    return complaint.startswith("Corrupt JPEG data") and "extraneous bytes before marker" not in complaint


def _formats(data: bytes) -> list[str]:
    return next(([name] for magic, name in _MAGIC if data.startswith(magic)), _other_formats())


@functools.cache
def _other_formats() -> list[str]:
    Image.init()
    # what people store images in: of the others one is a program (EPS), and some hold an image larger than they say
    return [name for name in ("GIF", "TIFF", "AVIF", "JPEG2000", "PPM") if name in Image.ID]


@contextlib.contextmanager
def _broken_image() -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:
        raise SampleError("image too large", str(error)) from error
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
        raise SampleError("broken image", f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image, grey_bits: int = 16) -> Image.Image:
    """Any colour mode to RGB: transparency over white, 16-bit grey to the upper 8 of `grey_bits` bits."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit levels at 255 instead of scaling them
        levels = np.clip(np.asarray(image) >> (grey_bits - 8), 0, 255)
        image = Image.fromarray(levels.astype(np.uint8))
    return image.convert("RGB")
