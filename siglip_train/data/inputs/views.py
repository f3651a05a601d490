"""Augmented views of a sample's image and masked patches, for self-distillation and masked prediction.

Losses between images and texts see the image of `images.py`, not these (SigLIP 2, section 2.3).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from siglip_train.batch import Images
from siglip_train.data.choices import Choices
from siglip_train.data.config import SourceConfig, ViewsConfig
from siglip_train.data.image_file import Encoded
from siglip_train.data.image_transform import divisor_for, patch_grid, patchify, random_box, resize_pixels
from siglip_train.data.inputs.base import Empty, Input, InputSetup
from siglip_train.data.shards.reader import RawSample


class Views(NamedTuple):
    """Of B images.

    whole: the global view, `Images` of `[B, L, P]` as the model's images are. local: patches `[B, V, l, P]` and grid
    `[B, V, l, 2]` of V local views. masked: `[B, M]` int64, the M patches of the global view, in order, that the
    student does not see.
    """

    whole: Images
    local: Images
    masked: Tensor


class _Row(NamedTuple):
    whole: NDArray  # [L, P]
    local: NDArray  # [V, l, P]
    masked: NDArray  # [M]


class ViewsInput(Input):
    """`Views`, drawn from the sample's generator, so that they do not depend on order, workers or ranks."""

    part = "views"

    def __init__(self, setup: InputSetup) -> None:
        self.transform, self.max_pixels = setup.run.transform, setup.data.max_image_pixels
        self.config = setup.data.views
        values = 3 * self.transform.patch_size**2
        places = len(self.transform.grid) + self.config.local * self.config.local_patches**2
        self.row_bytes = places * values

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        """The image, which every source has."""
        return ("image",)

    def make(self, sample: RawSample, choices: Choices) -> _Row:
        """uint8 `[L, P]` and `[V, l, P]`, int64 `[M]`. Raises `SampleError` for an image that cannot be decoded."""
        config, size = self.config, self.transform.patch_size
        side, local_side = self.transform.image_size, config.local_patches * size
        encoded = Encoded(sample.members["image"], self.max_pixels, strict=True)
        divisor: Literal[1, 2, 4, 8] = 1
        if self.transform.reduced_jpeg:
            # the smallest crops that may be drawn, so that all views are of one decoded image
            shortest = min(encoded.size)
            divisor = min(
                divisor_for(shortest * math.sqrt(scale[0]), wanted)
                for scale, wanted in ((config.global_scale, side), (config.local_scale, local_side))
            )
        pixels = encoded.pixels(divisor)
        view = partial(_view, pixels, self.config, choices.generator)
        whole = patchify(view(config.global_scale, side), size)
        local = [patchify(view(config.local_scale, local_side), size) for _ in range(config.local)]
        # by number and not as flags, so that their count is known without a look at them
        masked = np.sort(choices.generator.permutation(len(whole))[: round(config.masked * len(whole))])
        shape = (0, config.local_patches**2, whole.shape[1])
        return _Row(whole, np.stack(local) if local else np.empty(shape, np.uint8), masked)

    def collate(self, rows: list[Any], empty: Empty) -> Views:
        """Stack them, with the grids of the patches."""
        whole = self.transform.batch(
            [row.whole for row in rows], empty((len(rows), *rows[0].whole.shape), torch.uint8)
        )
        local = torch.stack(
            [torch.from_numpy(row.local) for row in rows],
            out=empty((len(rows), *rows[0].local.shape), torch.uint8),
        )
        grid = patch_grid(self.config.local_patches, self.config.local_patches)
        masked = torch.from_numpy(np.stack([row.masked for row in rows]))
        return Views(whole, Images(local, grid.expand(*local.shape[:2], -1, -1).contiguous()), masked)


def _view(
    pixels: NDArray, config: ViewsConfig, rng: np.random.Generator, scale: tuple[float, float], side: int
) -> NDArray:
    """A random crop, resized to `[side, side, 3]`, mirrored and changed in colour and sharpness (DINO, appendix)."""
    size = pixels.shape[1], pixels.shape[0]
    left, top, right, bottom = random_box(size, scale, rng) or (0, 0, *size)
    # as in DINO, whatever the filter of the model's images
    view = resize_pixels(pixels[top:bottom, left:right], side, side, "bicubic")
    if rng.random() < config.mirrored:
        view = torch.from_numpy(view).flip(1).numpy()
    image = Image.fromarray(view)
    if rng.random() < config.jittered:
        image = _jittered(image, config.jitter, rng)
    if rng.random() < config.grey:
        image = image.convert("L").convert("RGB")
    if rng.random() < config.blurred:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    return np.asarray(image)


def _jittered(
    image: Image.Image, strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> Image.Image:
    """Brightness, contrast, saturation and hue, in an order that is drawn too."""
    *others, hue = strengths
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = [rng.uniform(max(0, 1 - by), 1 + by) for by in others]
    changes: list[Callable[[Image.Image], Image.Image]] = [
        *(partial(_enhanced, kind=kind, factor=factor) for kind, factor in zip(kinds, factors, strict=True)),
        partial(_turned, turn=rng.uniform(-hue, hue)),
    ]
    for index in rng.permutation(len(changes)):
        image = changes[index](image)
    return image


def _enhanced(image: Image.Image, kind: type, factor: float) -> Image.Image:
    return kind(image).enhance(factor)


def _turned(image: Image.Image, turn: float) -> Image.Image:
    """With hues moved by `turn` of the circle."""
    hue, *rest = image.convert("HSV").split()
    moved = Image.fromarray(np.asarray(hue) + np.uint8(round(turn * 256) % 256))  # wraps round
    return Image.merge("HSV", (moved, *rest)).convert("RGB")
