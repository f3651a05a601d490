"""The image of a sample, as patches."""

from typing import Any

import torch

from siglip_train.batch import Images
from siglip_train.data.choices import Choices
from siglip_train.data.config import SourceConfig
from siglip_train.data.inputs.base import Empty, Input, InputSetup
from siglip_train.data.shards.reader import RawSample


class ImageInput(Input):
    """`Images` of uint8 patches `[B, L, P]`, cropped and mirrored as the data's config says."""

    part = "images"

    def __init__(self, setup: InputSetup) -> None:
        self.transform, self.max_pixels = setup.run.transform, setup.data.max_image_pixels
        self.row_bytes = len(self.transform.grid) * 3 * self.transform.patch_size**2

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        """The image, which every source has."""
        return ("image",)

    def make(self, sample: RawSample, choices: Choices) -> Any:
        """uint8 `[L, P]`."""
        return self.transform.for_training(sample.members["image"], choices, self.max_pixels)

    def collate(self, rows: list[Any], empty: Empty) -> Images:
        """Stack the patches."""
        return self.transform.batch(rows, empty((len(rows), *rows[0].shape), torch.uint8))
