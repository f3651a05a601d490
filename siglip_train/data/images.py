"""From the bytes of a picture to uint8 patches: decode, squash-resize, optional crop and mirror, patchify."""

import io
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from siglip_train.batch import Images
from siglip_train.data.faults import SampleError
from siglip_train.errors import UserError

try:
    import simplejpeg
except ImportError:
    # optional: the same libjpeg-turbo as Pillow's, with less work around it
    simplejpeg = None

# Pillow refuses larger pictures by itself, before it allocates them
MAX_PIXELS = 178_956_970
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_CROP_ATTEMPTS = 10
# first bytes of the common formats: otherwise Pillow tries half a dozen plugins on every picture
_MAGIC = ((b"\xff\xd8", "JPEG"), (b"\x89PNG", "PNG"), (b"RIFF", "WEBP"), (b"BM", "BMP"))


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode JPEG, PNG, WebP, ... to an RGB picture.

    Transparent pixels are put over white; 16-bit grey keeps its upper 8 bits; CMYK, palettes and 1-bit follow
    Pillow. The EXIF orientation is ignored, as the published models' pipelines do.
    Raises `SampleError` for what cannot be decoded completely and for more than `max_pixels` pixels.
    """
    if not data:
        raise SampleError("empty image", "0 bytes")
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            return _decode_jpeg(data, max_pixels)
        except ValueError as error:
            # also odd but readable files, which are Pillow's to judge
            if isinstance(error, SampleError):
                raise
    try:
        with Image.open(io.BytesIO(data), formats=_formats(data)) as image:
            _check_pixels(*image.size, max_pixels)
            image.load()
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise SampleError("image too large", str(error)) from error
    except SampleError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
        raise SampleError("broken image", f"{type(error).__name__}: {error}") from error


def _formats(data: bytes) -> list[str] | None:
    return next(([name] for magic, name in _MAGIC if data.startswith(magic)), None)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise SampleError("image too large", f"{width} x {height} pixels, limit {max_pixels}")


def _decode_jpeg(data: bytes, max_pixels: int) -> Image.Image:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(width, height, max_pixels)
    if colorspace in ("CMYK", "YCCK"):
        raise ValueError("CMYK is Pillow's")
    return Image.fromarray(simplejpeg.decode_jpeg(data))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any colour mode to RGB: transparency over white, 16-bit grey to its upper 8 bits."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit levels at 255 instead of scaling them
        levels = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
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
    area, of aspect 3/4 to 4/3, is resized instead. Both only happen where a generator is handed in.
    """

    image_size: int
    patch_size: int
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    flip: bool = False
    min_crop_area: float = 1.0

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

    def without_augmentation(self) -> "ImageTransform":
        """The same resize without crop and mirror, for evaluation."""
        return replace(self, flip=False, min_crop_area=1.0)

    def resized(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """The `image_size` square, antialiased by Pillow."""
        box = None
        if rng is not None and self.min_crop_area < 1:
            box = _random_box(image.size, self.min_crop_area, rng)
        square = image.resize((self.image_size, self.image_size), _FILTERS[self.resize], box=box)
        if rng is not None and self.flip and rng.random() < 0.5:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return square

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> NDArray:
        """RGB picture to uint8 `[L, P]`; `rng` draws the augmentation, None = none."""
        return patchify(np.asarray(self.resized(image, rng)), self.patch_size)

    def batch(self, patches: list[NDArray]) -> Images:
        """Stack B results of this transform."""
        grid = self.grid
        stacked = (
            torch.from_numpy(np.stack(patches))
            if patches
            else torch.empty(0, len(grid), 0, dtype=torch.uint8)
        )
        return Images(stacked, grid.expand(len(patches), -1, -1).contiguous())


def _random_box(
    size: tuple[int, int], min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """The Inception crop: (left, top, right, bottom), or None for the whole picture when none fits."""
    width, height = size
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return None
