"""Fingerprints that survive encodings and sizes, and a search that finds what comparing all with all finds."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from data_tools.filter.duplicates import near_duplicates, near_pairs, repeated
from data_tools.filter.fingerprint import COLOUR_TOLERANCE, Fingerprint, fingerprint
from siglip_train.data.image_file import decode
from siglip_train.data.shards.reader import read_samples

DATA = Path(__file__).parents[3] / "shared" / "data"


def bits_apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def is_near(one: Fingerprint, other: Fingerprint, bits: int = 4) -> bool:
    colours = np.abs(one.colours.astype(int) - other.colours.astype(int)).max()
    return bits_apart(one.hash, other.hash) <= bits and colours <= COLOUR_TOLERANCE


def by_comparing_all(hashes: list[int], colours: np.ndarray, bits: int, tolerance: int) -> list[int]:
    origin: list[int] = []
    for place, code in enumerate(hashes):
        near = (
            earlier for earlier in range(place)
            if origin[earlier] < 0 and bits_apart(code, hashes[earlier]) <= bits
            and np.abs(colours[place].astype(int) - colours[earlier].astype(int)).max() <= tolerance
        )  # fmt: skip
        origin.append(next(near, -1))
    return origin


@pytest.mark.parametrize("bits", [0, 1, 4, 10])
def test_the_search_is_exact(bits: int) -> None:
    random = np.random.default_rng(bits)
    # few centres and many flips: clusters, chains, equal codes and equal hashes of other colours
    centres = random.integers(0, 2**64, 12, dtype=np.uint64)
    hashes = random.choice(centres, 500)
    for _ in range(7):
        flips = np.uint64(1) << random.integers(0, 64, 500, dtype=np.uint64)
        hashes = np.where(random.random(500) < 0.45, hashes ^ flips, hashes)
    colours = (random.integers(0, 3, (500, 1)) * 12 + random.integers(0, 2, (500, 48))).astype(np.uint8)
    found = near_duplicates(hashes, colours, bits, tolerance=13)
    expected = by_comparing_all(hashes.tolist(), colours, bits, tolerance=13)
    assert 0 < sum(each >= 0 for each in expected) < 500
    assert [each >= 0 for each in found.tolist()] == [each >= 0 for each in expected]
    for place, origin in enumerate(found.tolist()):
        # the origin named stays itself, and is near
        if origin >= 0:
            assert found[origin] == -1
            assert bits_apart(int(hashes[place]), int(hashes[origin])) <= bits


@pytest.mark.parametrize("count", [2, 300, 20_000])
def test_every_pair_within_reach_is_found_whatever_the_number_of_blocks(count: int) -> None:
    random = np.random.default_rng(count)
    hashes = random.integers(0, 2**64, count, dtype=np.uint64)
    planted = set()
    for place in range(0, count - 1, 2):
        if place % 50 == 0:
            flips = random.choice(64, 4, replace=False).tolist()
            hashes[place + 1] = hashes[place] ^ np.uint64(sum(1 << flip for flip in flips))
            planted.add((place, place + 1))
    found = {
        tuple(sorted(pair))
        for part in near_pairs(hashes, 4)
        for pair in zip(*map(np.ndarray.tolist, part), strict=True)
    }
    # 64 random bits come as near as that once in 10^13 pairs
    assert found == planted


def test_repeats_beyond_the_first() -> None:
    digests = np.array([5, 9, 5, 5, 7, 9], dtype=np.uint64)
    assert repeated(digests).tolist() == [-1, -1, 0, 0, -1, 1]
    assert repeated(digests, most=2).tolist() == [-1, -1, -1, 0, -1, -1]
    assert repeated(digests[:0]).tolist() == []
    assert near_duplicates(digests[:0], np.empty((0, 48), np.uint8), 4).tolist() == []


def test_flat_pictures_differ_by_their_colours() -> None:
    colours = [
        (255, 255, 255),
        (250, 250, 250),
        (0, 0, 0),
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
        (90, 90, 90),
    ]
    prints = [fingerprint(Image.new("RGB", (50, 80), colour)) for colour in colours]
    # nothing but colour tells them apart
    assert {each.hash for each in prints} == {0}
    origin = near_duplicates(
        np.array([each.hash for each in prints], np.uint64), np.stack([each.colours for each in prints]), 4
    )
    assert origin.tolist() == [-1, 0, -1, -1, -1, -1, -1]


def test_noise_of_an_encoder_is_no_shape() -> None:
    buffer = io.BytesIO()
    levels = np.random.default_rng(0).normal(128, 3, (200, 200, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(levels).save(buffer, "JPEG", quality=40)
    assert fingerprint(decode(buffer.getvalue())).hash == 0


def test_stripes_differ_from_one_another() -> None:
    """The square of frequencies of the usual hash is blind to what varies along one axis alone."""

    def striped(stripes: int, *, upright: bool) -> Fingerprint:
        image = Image.new("RGB", (120, 120), (180, 180, 180))
        draw = ImageDraw.Draw(image)
        for stripe in range(0, stripes, 2):
            low, high = 120 * stripe // stripes, 120 * (stripe + 1) // stripes - 1
            draw.rectangle((low, 0, high, 119) if upright else (0, low, 119, high), fill=(150, 150, 150))
        return fingerprint(image)

    prints = [striped(stripes, upright=upright) for stripes in (2, 3, 5) for upright in (True, False)]
    assert len({each.hash for each in prints}) == len(prints)


def changes(image: Image.Image) -> dict[str, Image.Image]:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return {
        "jpeg": decode(buffer.getvalue()),
        "half": image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
        "double": image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
        "brighter": ImageEnhance.Brightness(image).enhance(1.08),
    }


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is absent")
def test_photographs_are_found_again_and_not_mistaken() -> None:
    pictures = [decode(sample.members["jpg"]) for sample in read_samples(str(DATA / "captions_coco"))]
    prints = [fingerprint(picture) for picture in pictures]
    for place, one in enumerate(prints):
        assert not any(is_near(one, other, bits=10) for other in prints[:place])
    for name in changes(pictures[0]):
        again = [fingerprint(changes(picture)[name]) for picture in pictures[::4]]
        found = sum(is_near(one, other) for one, other in zip(prints[::4], again, strict=True))
        # all of them were, when this was written
        assert found >= 0.95 * len(again), name
