"""Sizes: which tile a GPU works on, and how many rows of images it takes at a time. Needs no Triton."""

from math import ceil
from typing import NamedTuple


class Tile(NamedTuple):
    """One program's share. parts, group: see `kernel.py`; descriptors: blocks are moved by the TMA unit."""

    images: int
    texts: int
    depth: int
    parts: int
    group: int
    warps: int
    stages: int
    descriptors: bool


# chosen by what they compile to (README): no spills; on Hopper and Blackwell, two programs fit a multiprocessor
HOPPER = Tile(128, 128, 64, parts=2, group=8, warps=4, stages=3, descriptors=True)
AMPERE = Tile(128, 128, 32, parts=4, group=8, warps=4, stages=4, descriptors=False)
# embeddings in fp32, whose factors are bf16: group 4, so that G is 1 to 5e-10
HOPPER_FP32 = HOPPER._replace(group=4)
AMPERE_FP32 = AMPERE._replace(texts=256, group=4, warps=8, stages=3)
# the interpreter's time goes by the number of programs and not by their size
INTERPRETED = Tile(32, 32, 32, parts=2, group=4, warps=4, stages=1, descriptors=False)

INTERPRETED_16_BITS = INTERPRETED._replace(group=8)

# cuBLAS tiles of 128 x these, and their worth beside the widest
_PRODUCT_TILES = ((256, 1.0), (192, 0.97), (128, 0.9))


def choose_tile(capability: tuple[int, int], element_size: int) -> Tile:
    """The tile for a GPU and embeddings of so many bytes a number."""
    has_descriptors = capability[0] in (9, 10)
    if element_size == 4:
        return HOPPER_FP32 if has_descriptors else AMPERE_FP32
    return HOPPER if has_descriptors else AMPERE


def interpreted_tile(element_size: int) -> Tile:
    """The interpreter's tile for embeddings of so many bytes a number: in groups as GPUs have them for these."""
    return INTERPRETED if element_size == 4 else INTERPRETED_16_BITS


def for_alike(tile: Tile) -> Tile:
    """The tile whose registers suffice for adding to what is in G."""
    return tile if tile.descriptors else tile._replace(warps=8)


def for_scores(tile: Tile) -> Tile:
    """The tile whose registers suffice for sums of rows and columns."""
    return tile._replace(parts=4) if tile.descriptors else tile


def choose_chunk_rows(rows: int, width: int, multiprocessors: int) -> int:
    """How many rows of images share one buffer of G: the number that leaves the fewest multiprocessors idle.

    After the tile kernel, G Y is a product of chunk x width, and its tiles of 128 rows come in waves of one per
    multiprocessor: a number like 4096 may leave a quarter of the GPU idle in the second wave. Chunks are at most 6 E
    rows, which makes G at most three times the size of both embeddings.
    """
    most = max(128, 6 * width // 128 * 128)
    if rows <= most:
        return rows

    def busy(chunk: int) -> float:
        return max(
            worth * _useful_share(chunk, width, columns, multiprocessors) for columns, worth in _PRODUCT_TILES
        )

    return max(range(128, most + 1, 128), key=lambda chunk: (round(busy(chunk), 3), chunk))


def _useful_share(chunk: int, width: int, columns: int, multiprocessors: int) -> float:
    """Of the room in all waves, the part that a product `[chunk, width]` in tiles of 128 x columns fills."""
    waves = ceil(chunk // 128 * ceil(width / columns) / multiprocessors)
    return chunk * width / (waves * multiprocessors * 128 * columns)
