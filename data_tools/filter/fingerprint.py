"""What near-duplicate images share: a 64-bit perceptual hash of the shapes, a coarse signature of the colours.

The hash follows the cosine-transform hash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions" (2010): the signs of the lowest frequencies of a 32 x 32 grey image. His square of frequencies leaves out
those along one axis, so that all stripes look alike (585 pairs of other flags and squares have equal hashes in
`emoji_train`, 148 with the round choice here). A hash says nothing of colours, and nothing at all of a flat image:
hence the signature. Its 8 x 8 cells also tell apart what differs in a detail: with 4 x 4, three times as many pairs
of different drawings in `emoji_train` count as near.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE, _BITS, _CELLS = 32, 64, 8
COLOURS = 3 * _CELLS * _CELLS
# the largest difference of two colours, in levels of 255: an image 10 % brighter differs by 26 at most
COLOUR_TOLERANCE = 32
# amplitude in grey levels; below is noise of an encoder, whose sign would be chance
_FAINT = 0.5


class Fingerprint(NamedTuple):
    """hash: 64 bits. colours: `[192]` uint8, the mean RGB of 8 x 8 cells."""

    hash: int
    colours: NDArray[np.uint8]


def _round_corner() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(vertical, horizontal) frequencies of the 64 slowest waves, the constant left out."""
    side = range(_BITS)
    waves = sorted(((v, h) for v in side for h in side), key=lambda wave: (wave[0] ** 2 + wave[1] ** 2, wave))
    vertical, horizontal = np.array(waves[1 : _BITS + 1]).T
    return vertical, horizontal


_VERTICAL, _HORIZONTAL = _round_corner()


def _cosines() -> NDArray[np.float64]:
    """`[F, 32]`: the rows of the cosine transform (DCT-II) that are needed, scaled to give amplitudes."""
    frequency = np.arange(_VERTICAL.max() + 1)[:, None]
    waves = 2 / _SIDE * np.cos(math.pi / _SIDE * frequency * (np.arange(_SIDE) + 0.5))
    waves[0] /= math.sqrt(2)
    return waves


_COSINES = _cosines()


def fingerprint(image: Image.Image) -> Fingerprint:
    """Of an RGB image, squashed to a square: sizes and encodings change it little, crops and mirroring much."""
    small = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    grey = small @ (0.299, 0.587, 0.114)
    amplitudes = (_COSINES @ grey @ _COSINES.T)[_VERTICAL, _HORIZONTAL]
    bits = np.packbits(amplitudes > _FAINT)
    cell = _SIDE // _CELLS
    colours = small.reshape(_CELLS, cell, _CELLS, cell, 3).mean(axis=(1, 3))
    return Fingerprint(int.from_bytes(bits.tobytes(), "big"), np.rint(colours).astype(np.uint8).ravel())
