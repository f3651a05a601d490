"""Decoding, colour modes, resize parity, patches."""

import io
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from siglip_train.data import image_file
from siglip_train.data.choices import Choices
from siglip_train.data.image_file import decode, without_texts
from siglip_train.data.image_transform import ImageTransform, patchify
from siglip_train.errors import SampleError, UserError
from tests.data.conftest import encoded, picture

# the goldens are Pillow 13's; those before it round a little otherwise where an image is long and narrow
ATOL = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 3
GOLDENS = Path(__file__).resolve().parents[2].parent / "shared" / "goldens"


@pytest.mark.skipif(not GOLDENS.exists(), reason="../shared/goldens is not here")
@pytest.mark.parametrize("size", [32, 56])
def test_bicubic_squash_equals_the_huggingface_processor_exactly(size: int):
    expected = np.load(GOLDENS / "fixed_res_preprocess" / "expected.npz")[f"{size}/hf_pil_u8"]
    transform = ImageTransform(size, 8, "bicubic")
    for path, levels in zip(sorted((GOLDENS / "images").glob("*.png")), expected, strict=True):
        got = np.asarray(transform.resized(decode(path.read_bytes())))
        np.testing.assert_allclose(got.transpose(2, 0, 1).astype(int), levels.astype(int), rtol=0, atol=ATOL)


def test_bilinear_is_pillows():
    image = picture(size=(75, 40))
    expected = image.resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(ImageTransform(32, 8).resized(image)), np.asarray(expected))


@pytest.mark.parametrize(("size", "side"), [(224, 256), (256, 292), (384, 438)])
def test_few_shot_probes_see_the_middle_of_a_larger_square(size: int, side: int):
    """recipe.md 6.3: resize to int(256 / 224 * size), centre crop."""
    image = picture(size=(75, 40))
    larger = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    edge = (side - size) // 2
    transform = ImageTransform(size, 16)
    got = np.asarray(transform.resized(image, 224 / 256))
    np.testing.assert_array_equal(got, larger[edge : edge + size, edge : edge + size])
    np.testing.assert_array_equal(transform(image, 224 / 256), patchify(got, 16))


def test_jpeg_decodes_to_the_same_pixels_with_and_without_simplejpeg(monkeypatch: pytest.MonkeyPatch):
    data = encoded(picture(size=(101, 67)).resize((90, 64)), "jpg")
    fast = np.asarray(decode(data))
    monkeypatch.setattr(image_file, "simplejpeg", None)
    np.testing.assert_array_equal(fast, np.asarray(decode(data)))


@pytest.mark.parametrize("progressive", [False, True])
def test_training_refuses_a_jpeg_with_a_hole_which_evaluation_reads_as_pillow_does(
    progressive: bool, monkeypatch: pytest.MonkeyPatch
):
    whole = jpeg(picture(size=(96, 64)), progressive=progressive)
    hole = whole[: len(whole) // 2] + whole[-2:]
    assert decode(whole, strict=True).size == (96, 64)
    with pytest.raises(SampleError) as found:
        decode(hole, strict=True)
    assert found.value.cause == "damaged picture data"
    with pytest.raises(SampleError, match="damaged picture data"):
        ImageTransform(32, 8).for_training(hole, Choices(np.random.default_rng(0)))
    lenient = np.asarray(decode(hole))
    monkeypatch.setattr(image_file, "simplejpeg", None)
    np.testing.assert_array_equal(lenient, np.asarray(decode(hole)))
    np.testing.assert_array_equal(lenient, np.asarray(decode(hole, strict=True)))


def test_padding_is_no_damage():
    whole = jpeg(picture(size=(96, 64)))
    padded = whole[:-2] + bytes(40) + whole[-2:]
    with pytest.raises(ValueError, match="extraneous bytes before marker"):
        image_file.simplejpeg.decode_jpeg(padded)
    np.testing.assert_array_equal(np.asarray(decode(padded, strict=True)), np.asarray(decode(whole)))


def jpeg(image: Image.Image, **options: bool) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def test_patches_are_row_major_with_row_column_channel_inside():
    pixels = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    patches = patchify(pixels, 2)
    assert patches.shape == (6, 12)
    for number, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        block = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(patches[number], block.reshape(-1))


def test_remainder_is_dropped_at_the_right_and_the_bottom():
    transform = ImageTransform(384, 14)
    image = picture(size=(384, 384))
    patches = transform(image)
    assert patches.shape == (27 * 27, 14 * 14 * 3)
    assert transform.grid.shape == (27 * 27, 2)
    np.testing.assert_array_equal(patches[-1], np.asarray(image)[364:378, 364:378].reshape(-1))


def test_grid_is_row_column():
    assert ImageTransform(16, 8).grid.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_batch_stacks_patches_and_grid():
    transform = ImageTransform(16, 8)
    batch = transform.batch([transform(picture(seed)) for seed in range(3)])
    assert batch.patches.shape == (3, 4, 192)
    assert batch.patches.dtype == torch.uint8
    assert batch.grid.shape == (3, 4, 2)
    assert batch.mask is None


def _centre(data: bytes) -> tuple[int, ...]:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel((image.width // 2, image.height // 2))


def test_grey_one_bit_and_palette():
    assert _centre(encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert _centre(encoded(Image.new("L", (16, 16), 77), "jpg")) == (77, 77, 77)
    assert _centre(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert _centre(encoded(Image.new("RGB", (4, 4), (10, 200, 30)).convert("P"))) == pytest.approx(
        (10, 200, 30), abs=26
    )


def test_transparency_is_over_white():
    assert _centre(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))) == (255, 255, 255)
    assert _centre(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))) == (127, 127, 127)
    assert _centre(encoded(Image.new("LA", (4, 4), (9, 0)))) == (255, 255, 255)
    out = io.BytesIO()
    indexed = Image.new("P", (4, 4), 1)
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.save(out, "PNG", transparency=1)
    assert _centre(out.getvalue()) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    levels = np.full((4, 4), 0x4080, dtype=np.uint16)
    assert _centre(encoded(Image.fromarray(levels))) == (0x40, 0x40, 0x40)


def test_fewer_bits_than_sixteen_are_scaled_on_request():
    levels = np.full((4, 4), 0x0408, dtype=np.uint16)
    assert _centre(encoded(Image.fromarray(levels))) == (4, 4, 4)
    assert decode(encoded(Image.fromarray(levels)), grey_bits=12).getpixel((0, 0)) == (0x40, 0x40, 0x40)


@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_a_png_with_much_text_is_a_picture(place: int, kind: bytes):
    """Programs that make images write how they made them beside the pixels."""
    text = zlib.compress(b"prompt " * 300_000)
    content = b"key\0\0" + text if kind == b"zTXt" else b"key\0\1\0\0\0" + text
    chunk = len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)
    data = encoded(picture(size=(40, 30)), "png")
    place %= len(data)
    with_text = data[:place] + chunk + data[place:]
    with pytest.raises(ValueError, match="Decompressed data too large"):
        Image.open(io.BytesIO(with_text)).load()
    np.testing.assert_array_equal(np.asarray(decode(with_text)), np.asarray(decode(data)))
    assert without_texts(data) is data
    # a chunk that is cut off ends the file where it is cut off
    cut = with_text[: place + 30]
    assert len(without_texts(cut)) <= len(cut)


def test_cmyk_jpeg():
    red = Image.new("RGB", (32, 32), (250, 10, 10)).convert("CMYK")
    assert _centre(encoded(red, "jpg")) == pytest.approx((250, 10, 10), abs=4)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty image"),
        (b"no image at all", "broken image"),
        (encoded(picture(size=(64, 64)), "jpg")[:900], "broken image"),
        (encoded(picture(size=(64, 64)), "png")[:900], "broken image"),
        (b"\xff\xd8 no jpeg", "broken image"),
    ],
    ids=["empty", "text", "torn jpeg", "torn png", "jpeg magic only"],
)
def test_unusable_bytes_have_a_cause(data: bytes, cause: str):
    with pytest.raises(SampleError) as caught:
        decode(data)
    assert caught.value.cause == cause


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_too_many_pixels_are_refused_before_decoding(kind: str):
    data = encoded(picture(size=(50, 40)), kind)
    assert decode(data, max_pixels=2000).size == (50, 40)
    with pytest.raises(SampleError) as caught:
        decode(data, max_pixels=1999)
    assert caught.value.cause == "image too large"


@pytest.mark.parametrize(
    "options", [{"resize": "nearest"}, {"min_crop_area": 0.0}, {"patch_size": 17}], ids=str
)
def test_wrong_options_are_user_errors(options: dict):
    with pytest.raises(UserError):
        ImageTransform(**{"image_size": 16, "patch_size": 8, **options})


def test_postscript_is_not_run():
    image = Image.new("RGB", (8, 8), "red")
    stored = io.BytesIO()
    image.save(stored, "EPS")
    with pytest.raises(SampleError, match="broken image: UnidentifiedImageError"):
        decode(stored.getvalue())
    other = io.BytesIO()
    image.save(other, "GIF")
    assert decode(other.getvalue()).getpixel((3, 3)) == (255, 0, 0)
