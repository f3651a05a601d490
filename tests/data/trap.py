"""An image that no worker comes back from. Apart from the tests, as workers import it."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from siglip_train.data.choices import Choices
from siglip_train.data.image_file import decode
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.remote.limits import MAX_PIXELS

ODD = (33, 33)


class Trap(ImageTransform):
    """Never returns from the one image of odd size: the first time only where there is a file to leave word in."""

    caught: Path | None = None

    def for_training(self, data: bytes, choices: Choices, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        if decode(data).size == ODD and not (self.caught is not None and self.caught.exists()):
            if self.caught is not None:
                self.caught.touch()
            while True:
                time.sleep(1)
        return super().for_training(data, choices, max_pixels)


class Deadly(ImageTransform):
    """Ends the process that decodes the one image of odd size, as a decoder with a fault does; or of any size."""

    always = False

    def for_training(self, data: bytes, choices: Choices, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        if self.always or decode(data).size == ODD:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().for_training(data, choices, max_pixels)
