"""The shards that loaders are compared on: generated scenes, emoji, photographs, large JPEGs made of photographs."""

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from data_tools.make_tiny.command import TinyOptions, make_tiny
from siglip_train.data.image_file import decode
from siglip_train.data.shards.reader import read_samples

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LARGE, LARGE_SHARDS, LARGE_PER_SHARD = (1024, 768), 2, 128


class Case(NamedTuple):
    """What is loaded: shards and the side of the squares. of_jpeg: no other images; compares_decoders: of ours."""

    shards: list[str]
    image_size: int
    of_jpeg: bool = False
    compares_decoders: bool = False


def prepare_cases(scratch: Path) -> dict[str, Case]:
    """Every case, made in `scratch`; those of `../shared/data` only where it is."""
    tiny = scratch / "tiny"
    make_tiny(tiny, TinyOptions(samples=4000, validation_samples=4, samples_per_class=1), workers=2)
    scenes = _names(tiny / "train")
    cases = {"tiny shapes 128 px": Case(scenes, 128)}
    if SHARED.exists():
        photographs = _repeated(SHARED / "captions_coco" / "open-00000.tar", scratch)
        cases["emoji 64 px"] = Case(_names(SHARED / "emoji_train"), 64)
        cases["photographs 224 px"] = Case(photographs, 224, of_jpeg=True, compares_decoders=True)
        tiles, grid = photographs[:1], (2, 2)
        for quality in (75, 85, 90):
            enlarged = write_mosaics(tiles, scratch / f"enlarged-{quality}", (1, 1), quality)
            name = f"1024 px photographs, quality {quality}, to 224 px"
            cases[name] = Case(enlarged, 224, of_jpeg=True, compares_decoders=quality == 90)
    else:
        print("../shared/data is absent: no photographs and emoji, and the large images are made of scenes")
        tiles, grid = scenes, (8, 6)
    for quality in (75, 90):
        mosaics = write_mosaics(tiles, scratch / f"mosaics-{quality}", grid, quality)
        cases[f"1024 px mosaics, quality {quality}, to 224 px"] = Case(mosaics, 224, of_jpeg=True)
    return cases


def _names(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def _repeated(shard: Path, scratch: Path) -> list[str]:
    links = [scratch / f"photographs-{number:05d}.tar" for number in range(8)]
    for link in links:
        link.symlink_to(shard)
    return list(map(str, links))


def write_mosaics(shards: list[str], folder: Path, tiles: tuple[int, int], quality: int) -> list[str]:
    """Shards of 1024 x 768 JPEGs, each `tiles` (columns, rows) images of `shards` side by side, with a caption.

    Four shrunk ones have detail at every pixel, more than a photograph of that size; a single one is enlarged and has
    less. 4:2:0, the same bytes every time. Quality 75 is what encoders write unless told otherwise.
    """
    folder.mkdir()
    samples = list(read_samples(shards))
    rng = np.random.default_rng(0)
    for number in range(LARGE_SHARDS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as shard:
            for key in range(LARGE_PER_SHARD):
                chosen = [samples[place] for place in rng.integers(len(samples), size=tiles[0] * tiles[1])]
                images = [next(iter(sample.members.values())) for sample in chosen]
                _add(shard, f"{key:04d}.jpg", _mosaic([decode(data) for data in images], tiles, quality))
                _add(shard, f"{key:04d}.txt", chosen[0].members["txt"])
    return _names(folder)


def _mosaic(images: list[Image.Image], tiles: tuple[int, int], quality: int) -> bytes:
    width, height = LARGE[0] // tiles[0], LARGE[1] // tiles[1]
    mosaic = Image.new("RGB", LARGE)
    for place, image in enumerate(images):
        tile = ImageOps.fit(image, (width, height))
        mosaic.paste(tile, (place % tiles[0] * width, place // tiles[0] * height))
    out = io.BytesIO()
    mosaic.save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))
