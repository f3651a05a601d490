"""A picture that no worker comes back from. Apart from the tests, as workers import it."""

import time
from pathlib import Path

import numpy as np
from PIL import Image

from siglip_train.data.images import ImageTransform

ODD = (33, 33)


class Trap(ImageTransform):
    """Never returns from the one picture of odd size: the first time only where there is a file to leave word in."""

    caught: Path | None = None

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        if image.size == ODD and not (self.caught is not None and self.caught.exists()):
            if self.caught is not None:
                self.caught.touch()
            while True:
                time.sleep(1)
        return super().__call__(image, rng)
