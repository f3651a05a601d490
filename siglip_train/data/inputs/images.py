"""From the bytes of a picture to uint8 patches: decode, squash-resize, optional crop and mirror, patchify."""

import contextlib
import functools
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import default_collate

from siglip_train.batch import Images
from siglip_train.data.remote.limits import MAX_PIXELS
from siglip_train.errors import SampleError, UserError

try:
    import simplejpeg
except ImportError:
    # optional: the same libjpeg-turbo as Pillow's, with less work around it
    simplejpeg = None

Box = tuple[int, int, int, int]  # left, top, right, bottom
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_CROP_ATTEMPTS = 10
# what is left to the antialiased resize after a reduced decode: from here on both ways to the small picture differ by
# less than bilinear and bicubic do (benchmarks/NOTES.md)
_LEAST_REDUCTION = 1.5
# the marker of a scan: each goes over the whole picture, and takes a few bytes; cameras and editors write at most 20
_SCAN, _MAX_SCANS = b"\xff\xda", 200
# first bytes of the common formats: otherwise Pillow tries half a dozen plugins on every picture
_MAGIC = ((b"\xff\xd8", "JPEG"), (b"\x89PNG", "PNG"), (b"RIFF", "WEBP"), (b"BM", "BMP"))
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


class Encoded:
    """A picture whose `size` (width, height) is known and whose pixels are decoded, once, when they are asked for.

    strict: refuse too a JPEG in whose data libjpeg lost its way, which it fills with grey or streaks, as training and
    `siglip-data` do; evaluation takes it, as others' does. Only simplejpeg tells, so that nothing changes without it,
    nor for CMYK. Raises `SampleError` for what cannot be decoded completely
    and for more than `max_pixels` pixels, before they take memory. grey_bits: those of 16 that grey pictures use.
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
        """The picture in RGB."""
        decoded = self._decoded(1)
        return decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded)

    def pixels(self, divisor: Literal[1, 2, 4, 8] = 1) -> NDArray:
        """uint8 `[H, W, 3]`; a JPEG with its sides divided and rounded up, other formats as they are.

        A JPEG is stored in blocks of frequencies, and the low ones alone give the smaller picture: less work, and
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
    """Decode JPEG, PNG, WebP, ... to an RGB picture.

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
    # what people store pictures in: of the others one is a program (EPS), and some hold a picture larger than they say
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


def patchify(pixels: NDArray, patch_size: int) -> NDArray:
    """`[H, W, 3]` to `[L, P]`: row-major grid, (row, column, channel) in a patch.

    What is left at the right and at the bottom is dropped, as by a convolution without padding (384 / 14
    gives 27 x 27).
    """
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    pixels = pixels[: rows * patch_size, : columns * patch_size]
    blocks = pixels.reshape(rows, patch_size, columns, patch_size, 3)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(rows * columns, patch_size * patch_size * 3)  # [L, P]


def patch_grid(rows: int, columns: int) -> torch.Tensor:
    """`[rows * columns, 2]` int64: (row, column) of every patch, row-major."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((row.flatten(), column.flatten()), dim=1)


@dataclass(frozen=True)
class ImageTransform:
    """A picture of any size to the patches of an `image_size` square: squashed, not cropped, as in SigLIP.

    flip: mirror every second picture. min_crop_area: below 1, a random crop of at least this share of the
    area, of aspect 3/4 to 4/3, is resized instead. reduced_jpeg: decode a large JPEG at 1/2, 1/4 or 1/8 where both
    sides (of the crop) stay half as long again as needed. These are for training; a call is exact.
    """

    image_size: int
    patch_size: int
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    flip: bool = False
    min_crop_area: float = 1.0
    reduced_jpeg: bool = True

    def __post_init__(self) -> None:
        if self.resize not in _FILTERS:
            raise UserError(f"resize is {self.resize!r}, but must be one of {', '.join(_FILTERS)}")
        if not 0 < self.min_crop_area <= 1:
            raise UserError(
                f"min_crop_area is {self.min_crop_area}, but is a share of the picture: 0 < share <= 1"
            )
        if not 0 < self.patch_size <= self.image_size:
            raise UserError(f"patch_size {self.patch_size} does not fit into image_size {self.image_size}")

    @property
    def grid(self) -> torch.Tensor:
        """`[L, 2]` int64 patch coordinates, the same for every picture."""
        side = self.image_size // self.patch_size
        return patch_grid(side, side)

    def __call__(self, image: Image.Image, center: float = 1.0) -> NDArray:
        """RGB picture to uint8 `[L, P]`, without augmentation, to the last bit as Pillow resizes it."""
        return patchify(np.asarray(self.resized(image, center)), self.patch_size)

    def resized(self, image: Image.Image, center: float = 1.0) -> Image.Image:
        """The `image_size` square, antialiased by Pillow; below 1, the middle of a square larger by 1 / center."""
        side = int(self.image_size / center)
        image = image.resize((side, side), _FILTERS[self.resize])
        edge = (side - self.image_size) // 2
        return image.crop((edge, edge, edge + self.image_size, edge + self.image_size))

    def for_training(self, data: bytes, rng: np.random.Generator, max_pixels: int = MAX_PIXELS) -> NDArray:
        """Encoded picture to uint8 `[L, P]` as fast as can be, `rng` drawing crop and mirror.

        Without them, and at full size, every level is within one of what a call gives, or a few at hard edges where
        the filter is bicubic and Pillow shrinks the columns first. Raises `SampleError`.
        """
        picture = Encoded(data, max_pixels, strict=True)
        box = (0, 0, *picture.size)
        if self.min_crop_area < 1:
            box = _random_box(picture.size, self.min_crop_area, rng) or box
        pixels = picture.pixels(self._divisor(box) if self.reduced_jpeg else 1)
        pixels = resize_pixels(_cut(pixels, box, picture.size), self.image_size, self.image_size, self.resize)
        if self.flip and rng.random() < 0.5:
            # torch mirrors pixels as vectors, numpy one by one
            pixels = torch.from_numpy(pixels).flip(1).numpy()
        return patchify(pixels, self.patch_size)

    def _divisor(self, box: Box) -> Literal[1, 2, 4, 8]:
        left, top, right, bottom = box
        spare = min(right - left, bottom - top) / (_LEAST_REDUCTION * self.image_size)
        return 8 if spare >= 8 else 4 if spare >= 4 else 2 if spare >= 2 else 1

    def batch(self, patches: list[NDArray], out: torch.Tensor | None = None) -> Images:
        """Stack B results of this transform, into `out` `[B, L, P]` if given."""
        grid = self.grid
        if not patches:
            return Images(torch.empty(0, len(grid), 0, dtype=torch.uint8), grid.expand(0, -1, -1))
        rows = [torch.from_numpy(each) for each in patches]
        # in a worker torch collates into shared memory, which saves a copy on the way to the main process
        stacked = default_collate(rows) if out is None else torch.stack(rows, out=out)
        return Images(stacked, grid.expand(len(patches), -1, -1).contiguous())


def resize_pixels(
    pixels: NDArray, height: int, width: int, resize: Literal["bilinear", "bicubic"]
) -> NDArray:
    """uint8 `[H, W, 3]` to `[height, width, 3]`, antialiased: Pillow's filters in a third of its time, by torch."""
    if pixels.shape[:2] == (height, width):
        # both would change nothing, and take a sixth of the time of a small picture for it
        return pixels
    # torch has vector code for three channels that lie together, and sees that they do in this view alone
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, (height, width), mode=resize, antialias=True)
    return image[0].permute(1, 2, 0).numpy()


def _cut(pixels: NDArray, box: Box, size: tuple[int, int]) -> NDArray:
    """The part in `box`, which is in pixels of the whole picture of this `size`."""
    rows, columns = pixels.shape[:2]
    left, right = (round(edge * columns / size[0]) for edge in box[::2])
    top, bottom = (round(edge * rows / size[1]) for edge in box[1::2])
    return pixels[top:bottom, left:right]


def _random_box(size: tuple[int, int], min_area: float, rng: np.random.Generator) -> Box | None:
    """The Inception crop, or None for the whole picture when none fits."""
    width, height = size
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return None
