"""The fast path from bytes to patches: JPEGs decoded small, resized by torch, cropped and mirrored."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from siglip_train.batch import Batch
from siglip_train.data import image_file
from siglip_train.data.choices import Choices
from siglip_train.data.image_file import Encoded, decode
from siglip_train.data.image_transform import ImageTransform, resize_pixels
from siglip_train.errors import SampleError
from tests.data.conftest import encoded, picture

PHOTOGRAPHS = (
    Path(__file__).resolve().parents[2].parent / "shared" / "data" / "captions_coco" / "open-00000.tar"
)
RESIZE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def _levels(patches: NDArray) -> NDArray:
    return patches.astype(int)


def _jpeg(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def _mosaics(photographs: int = 12) -> list[Image.Image]:
    """Images of 1024 x 768 made of twelve photographs each, so that they have detail at every pixel."""
    with tarfile.open(PHOTOGRAPHS) as shard:
        names = [name for name in shard.getnames() if name.endswith(".jpg")]
        found = [
            decode(shard.extractfile(name).read()).resize((256, 256)) for name in names[: 4 * photographs]
        ]
    mosaics = []
    for first in range(0, len(found), photographs):
        mosaic = Image.new("RGB", (1024, 768))
        for place, image in enumerate(found[first : first + photographs]):
            mosaic.paste(image, (place % 4 * 256, place // 4 * 256))
        mosaics.append(mosaic)
    return mosaics


@pytest.mark.parametrize("resize", RESIZE)
def test_resize_is_pillows_rows_first(resize: str):
    rng = np.random.default_rng(0)
    for side in (16, 32, 224):
        for _ in range(10):
            height, width = rng.integers(1, 500, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            # Pillow from 13 on shrinks the columns of a tall image first, and rounds in between
            image = Image.fromarray(pixels).resize((side, int(height)), RESIZE[resize])
            expected = np.asarray(image.resize((side, side), RESIZE[resize])).astype(int)
            got = resize_pixels(pixels, side, side, resize).astype(int)
            # measured on noise: bilinear 1, bicubic 2 (at one level in 200,000)
            assert np.abs(got - expected).max() <= (1 if resize == "bilinear" else 2)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "1", "CMYK"])
def test_training_sees_what_a_call_sees(mode: str):
    transform = ImageTransform(32, 8)
    data = encoded(picture(size=(70, 50)).convert(mode), "jpg" if mode == "CMYK" else "png")
    got = transform.for_training(data, Choices(np.random.default_rng(0)))
    assert got.dtype == np.uint8
    np.testing.assert_allclose(_levels(got), _levels(transform(decode(data))), rtol=0, atol=1)


@pytest.mark.parametrize(
    "options",
    [{"subsampling": 2}, {"subsampling": 1}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_decoders_give_the_same_small_pixels(mode: str, options: dict, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("simplejpeg")
    data = _jpeg(picture(size=(331, 203), mode=mode).resize((501, 307)), **options)
    fast = {divisor: Encoded(data).pixels(divisor) for divisor in (1, 2, 4, 8)}
    monkeypatch.setattr(image_file, "simplejpeg", None)
    for divisor, pixels in fast.items():
        assert pixels.shape == (-(-307 // divisor), -(-501 // divisor), 3)
        # they were equal wherever this was tried
        np.testing.assert_allclose(
            pixels.astype(int), Encoded(data).pixels(divisor).astype(int), rtol=0, atol=1
        )


def test_cmyk_is_reduced_too():
    data = _jpeg(Image.new("RGB", (320, 160), (250, 10, 10)).convert("CMYK"))
    pixels = Encoded(data).pixels(4)
    assert pixels.shape == (40, 80, 3)
    assert tuple(pixels[20, 40]) == pytest.approx((250, 10, 10), abs=4)


@pytest.mark.parametrize(
    ("size", "divisor"),
    [((64, 64), 1), ((95, 300), 1), ((96, 96), 2), ((192, 191), 2), ((300, 192), 4), ((384, 4000), 8)],
    ids=str,
)
def test_half_as_much_again_as_the_target_is_decoded(
    size: tuple[int, int], divisor: int, monkeypatch: pytest.MonkeyPatch
):
    decoded = []
    pixels_of = Encoded.pixels
    monkeypatch.setattr(Encoded, "pixels", lambda self, by=1: decoded.append(by) or pixels_of(self, by))
    data = _jpeg(Image.new("RGB", size))
    ImageTransform(32, 8).for_training(data, Choices(np.random.default_rng(0)))
    ImageTransform(32, 8, reduced_jpeg=False).for_training(data, Choices(np.random.default_rng(0)))
    assert decoded == [divisor, 1]


@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason="../shared/data is not here")
@pytest.mark.parametrize("resize", RESIZE)
def test_reduced_photographs_differ_little(resize: str):
    differences = []
    for image in _mosaics():
        data = _jpeg(image, quality=90)
        # the short side of the reduced image is 1.5 times the target, the least there is
        transform = ImageTransform(256, 16, resize)
        got = transform.for_training(data, Choices(np.random.default_rng(0)))
        differences.append(np.abs(_levels(got) - _levels(transform(decode(data)))))
    # measured with bilinear and bicubic: mean 1.02 and 0.97 of 255 levels, 99 % within 6, largest 18 and 21
    assert 0.3 < np.mean(differences) < 1.1
    assert np.quantile(differences, 0.99) <= 6
    assert np.max(differences) <= 25


def test_size_limit_is_on_the_whole_picture():
    data = _jpeg(Image.new("RGB", (400, 400)))
    transform = ImageTransform(16, 8)
    transform.for_training(data, Choices(np.random.default_rng(0)), max_pixels=160_000)
    with pytest.raises(SampleError) as caught:
        transform.for_training(data, Choices(np.random.default_rng(0)), max_pixels=159_999)
    assert caught.value.cause == "image too large"


def test_torn_jpeg_is_broken_at_any_size():
    data = _jpeg(picture(size=(400, 400)))
    with pytest.raises(SampleError) as caught:
        ImageTransform(16, 8).for_training(data[: len(data) * 2 // 3], Choices(np.random.default_rng(0)))
    assert caught.value.cause == "broken image"


def _square(patches: NDArray, side: int, patch: int) -> NDArray:
    """The image whose patches these are."""
    grid = side // patch
    return patches.reshape(grid, grid, patch, patch, 3).transpose(0, 2, 1, 3, 4).reshape(side, side, 3)


def test_flip_mirrors_half_of_the_pictures():
    image = picture(size=(16, 16))
    plain, transform = np.asarray(image), ImageTransform(16, 8, flip=True)
    got = [
        _square(transform.for_training(encoded(image), Choices(np.random.default_rng(seed))), 16, 8)
        for seed in range(400)
    ]
    flipped = sum(np.array_equal(square, plain[:, ::-1]) for square in got)
    assert 160 < flipped < 240
    assert flipped + sum(np.array_equal(square, plain) for square in got) == 400
    np.testing.assert_array_equal(_square(transform(image), 16, 8), plain)


def _gradient(side: int) -> Image.Image:
    """An image whose levels say where a pixel is, in 256ths."""
    rows, columns = (np.mgrid[0:side, 0:side] * 256 // side).astype(np.uint8)
    return Image.fromarray(np.stack([rows, columns, rows], axis=2))


def test_random_crops_keep_the_least_area_and_the_aspect():
    data = encoded(_gradient(100))
    transform = ImageTransform(50, 10, min_crop_area=0.25)
    boxes = set()
    for seed in range(50):
        got = _square(transform.for_training(data, Choices(np.random.default_rng(seed))), 50, 10).astype(int)
        height, width = np.ptp(got[..., 0]) / 256, np.ptp(got[..., 1]) / 256
        assert height * width > 0.22
        assert 0.68 < width / height < 1.47
        boxes.add((height, width))
    assert len(boxes) > 20


def test_crops_of_reduced_jpegs_are_the_same_crops():
    data = _jpeg(_gradient(512), quality=95, subsampling=0)
    reduced = ImageTransform(16, 8, min_crop_area=0.1)
    whole = ImageTransform(16, 8, min_crop_area=0.1, reduced_jpeg=False)
    for seed in range(30):
        got, expected = (
            _levels(transform.for_training(data, Choices(np.random.default_rng(seed))))
            for transform in (reduced, whole)
        )
        # an edge of the crop may lie half a pixel of the reduced image aside: up to two levels here
        assert np.abs(got - expected).max() <= 4


def test_crop_of_a_picture_nothing_fits_is_the_whole():
    data = encoded(picture(size=(300, 2)))
    cropped = ImageTransform(16, 8, min_crop_area=0.9).for_training(data, Choices(np.random.default_rng(0)))
    np.testing.assert_array_equal(
        cropped, ImageTransform(16, 8).for_training(data, Choices(np.random.default_rng(0)))
    )


def test_a_worker_stacks_into_shared_memory(monkeypatch: pytest.MonkeyPatch):
    transform = ImageTransform(16, 8)
    patches = [transform(picture(seed)) for seed in range(3)]
    assert not transform.batch(patches).patches.is_shared()
    # what torch asks to know whether it is in a worker
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: object())
    batch = transform.batch(patches)
    assert batch.patches.is_shared()
    np.testing.assert_array_equal(batch.patches.numpy(), np.stack(patches))


def test_levels_go_to_the_device_as_bytes_and_without_waiting(monkeypatch: pytest.MonkeyPatch):
    transform = ImageTransform(16, 8)
    batch = Batch(
        {"images": transform.batch([transform(picture())]), "texts": torch.zeros(1, 8, dtype=torch.int64)}
    )
    copied = []
    to = torch.Tensor.to

    def record(tensor: torch.Tensor, *target, **options) -> torch.Tensor:
        copied.append((tensor.dtype, options))
        return to(tensor, *target, **options)

    monkeypatch.setattr(torch.Tensor, "to", record)
    moved = batch.to(torch.device("meta"))
    assert moved.part("images").patches.dtype == torch.uint8
    assert [dtype for dtype, _ in copied] == [torch.uint8, torch.int64, torch.int64]
    assert all(options == {"non_blocking": True} for _, options in copied)
