"""From pixels of any size to the uint8 patches of the model's: squash-resize, optional crop and mirror, patchify."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import default_collate

from siglip_train.batch import Images
from siglip_train.data.choices import Choices
from siglip_train.data.image_file import Encoded
from siglip_train.data.remote.limits import MAX_PIXELS
from siglip_train.errors import UserError

Box = tuple[int, int, int, int]  # left, top, right, bottom
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_CROP_ATTEMPTS = 10
# from a crop to the next, of its side: the sliding window of segmentation protocols (341 of 512 pixels)
_CROP_STEP = 2 / 3
# what is left to the antialiased resize after a reduced decode: from here on both ways to the small image differ by
# less than bilinear and bicubic do (benchmarks/NOTES.md)
_LEAST_REDUCTION = 1.5


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


class View(NamedTuple):
    """What training sees of an image: the crop as shares of width and height, and whether it is mirrored after that."""

    crop: tuple[float, float, float, float]
    is_mirrored: bool


@dataclass(frozen=True)
class ImageTransform:
    """An image of any size to the patches of an `image_size` square: squashed, not cropped, as in SigLIP.

    flip: mirror every second image. min_crop_area: below 1, a random crop of at least this share of the
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
                f"min_crop_area is {self.min_crop_area}, but is a share of the image: 0 < share <= 1"
            )
        if not 0 < self.patch_size <= self.image_size:
            raise UserError(f"patch_size {self.patch_size} does not fit into image_size {self.image_size}")

    @property
    def grid(self) -> torch.Tensor:
        """`[L, 2]` int64 patch coordinates, the same for every image."""
        side = self.image_size // self.patch_size
        return patch_grid(side, side)

    def __call__(self, image: Image.Image, center: float = 1.0) -> NDArray:
        """RGB image to uint8 `[L, P]`, without augmentation, to the last bit as Pillow resizes it."""
        return patchify(np.asarray(self.resized(image, center)), self.patch_size)

    def resized(self, image: Image.Image, center: float = 1.0) -> Image.Image:
        """The `image_size` square, antialiased by Pillow; below 1, the middle of a square larger by 1 / center."""
        side = int(self.image_size / center)
        image = image.resize((side, side), _FILTERS[self.resize])
        edge = (side - self.image_size) // 2
        return image.crop((edge, edge, edge + self.image_size, edge + self.image_size))

    def crop_corners(self, count: int) -> tuple[int, list[tuple[int, int]]]:
        """The side of the square that `crops` cuts, and (top, left) of each crop, row-major."""
        step = round(self.image_size * _CROP_STEP)
        starts = [step * number for number in range(count)]
        return starts[-1] + self.image_size, [(top, left) for top in starts for left in starts]

    def crops(self, image: Image.Image, count: int) -> list[NDArray]:
        """Cut `count` x `count` squares, uint8 `[L, P]`, a third over their neighbours, of a larger squashed image."""
        side, corners = self.crop_corners(count)
        pixels = np.asarray(image.resize((side, side), _FILTERS[self.resize]))
        size = self.image_size
        return [
            patchify(pixels[top : top + size, left : left + size], self.patch_size) for top, left in corners
        ]

    def for_training(self, data: bytes, choices: Choices, max_pixels: int = MAX_PIXELS) -> NDArray:
        """Encoded image to uint8 `[L, P]` as fast as can be; `crop` and `mirror` are drawn by `choices`.

        Without them, and at full size, every level is within one of what a call gives, or a few at hard edges where
        the filter is bicubic and Pillow shrinks the columns first. Raises `SampleError`.
        """
        encoded = Encoded(data, max_pixels, strict=True)
        box = self._crop(encoded.size, choices)
        pixels = encoded.pixels(self._divisor(box) if self.reduced_jpeg else 1)
        pixels = resize_pixels(_cut(pixels, box, encoded.size), self.image_size, self.image_size, self.resize)
        if self._mirrors(choices):
            # torch mirrors pixels as vectors, numpy one by one
            pixels = torch.from_numpy(pixels).flip(1).numpy()
        return patchify(pixels, self.patch_size)

    @property
    def is_plain(self) -> bool:
        """Whether training sees every image whole, and none of them mirrored."""
        return not self.flip and self.min_crop_area == 1

    def view(self, size: tuple[int, int], choices: Choices) -> View:
        """What `for_training` takes of an image of this `size` (width, height) with the same choices."""
        left, top, right, bottom = self._crop(size, choices)
        width, height = size
        crop = (left / width, top / height, right / width, bottom / height)
        return View(crop, self._mirrors(choices))

    def _crop(self, size: tuple[int, int], choices: Choices) -> Box:
        box = (0, 0, *size)
        if self.min_crop_area < 1:
            box = choices.once("crop", partial(random_box, size, (self.min_crop_area, 1.0))) or box
        return box

    def _mirrors(self, choices: Choices) -> bool:
        return self.flip and choices.once("mirror", _is_mirrored)

    def _divisor(self, box: Box) -> Literal[1, 2, 4, 8]:
        left, top, right, bottom = box
        return divisor_for(min(right - left, bottom - top), self.image_size)

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
        # both would change nothing, and take a sixth of the time of a small image for it
        return pixels
    # torch has vector code for three channels that lie together, and sees that they do in this view alone
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, (height, width), mode=resize, antialias=True)
    return image[0].permute(1, 2, 0).numpy()


def _cut(pixels: NDArray, box: Box, size: tuple[int, int]) -> NDArray:
    """The part in `box`, which is in pixels of the whole image of this `size`."""
    rows, columns = pixels.shape[:2]
    left, right = (round(edge * columns / size[0]) for edge in box[::2])
    top, bottom = (round(edge * rows / size[1]) for edge in box[1::2])
    return pixels[top:bottom, left:right]


def _is_mirrored(rng: np.random.Generator) -> bool:
    return rng.random() < 0.5


def divisor_for(side: float, wanted: int) -> Literal[1, 2, 4, 8]:
    """At which part of its size a JPEG can be decoded, of which `side` pixels are resized to `wanted`."""
    spare = side / (_LEAST_REDUCTION * wanted)
    return 8 if spare >= 8 else 4 if spare >= 4 else 2 if spare >= 2 else 1


def random_box(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> Box | None:
    """The Inception crop, of a share of the area within `scale`, or None for the whole image when none fits."""
    width, height = size
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return None
