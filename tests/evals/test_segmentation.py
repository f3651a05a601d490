"""The probe of patch tokens against plain re-statements, and the task on images whose patches tell their class."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from siglip_train.data.image_transform import ImageTransform, patchify
from siglip_train.distributed.setup import World
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder
from siglip_train.evals.patch_classifier import Patches, trained
from siglip_train.evals.segmentation import Segmentation, enlarged
from siglip_train.models.vision import VisionFeatures
from siglip_train.report.sections import task_section
from tests.data.shard_files import write_tar
from tests.ranks import run_ranks

TRANSFORM = ImageTransform(image_size=16, patch_size=4)
COLOURS = {0: (255, 255, 255), 3: (200, 0, 0), 7: (0, 160, 0), 9: (0, 0, 220)}
MASKS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "masks_coco"


class SeesColours(nn.Module):
    """Tokens are the patches' own levels; the pooled output is their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vision=SimpleNamespace(width=48))

    def vision(self, patches, grid, mask) -> VisionFeatures:
        tokens = patches / 127.5 - 1
        return VisionFeatures(tokens, tokens.mean(dim=1), mask)


def encoder_on(rank: int = 0, world_size: int = 1) -> Encoder:
    world = World(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    return Encoder(model=SeesColours(), tokenizer=None, transform=TRANSFORM, world=world, batch_size=3)


def scene(seed: int) -> tuple[Image.Image, Image.Image]:
    """Two rectangles on white, with noise, and their class map; a stripe on the left is unlabelled (255)."""
    random = np.random.default_rng(seed)
    classes = np.zeros((24, 32), np.uint8)
    for _ in range(2):
        top, left = random.integers(0, 16), random.integers(0, 20)
        classes[top : top + 10, left : left + 14] = random.choice([3, 7, 9])
    pixels = np.array([COLOURS.get(each, (0, 0, 0)) for each in range(10)])[classes]
    pixels = np.clip(pixels + random.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
    classes[:, :3] = 255
    return Image.fromarray(pixels), Image.fromarray(classes)


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> tuple[str, str]:
    """Train: 14 samples, one of them without a mask, one with one of another size. Test: 7 others."""
    for name, seeds in (("train", range(14)), ("test", range(100, 107))):
        members = []
        for seed in seeds:
            image, mask = scene(seed)
            mask = mask.resize((5, 5)) if seed == 9 else mask
            members.append((f"{seed}.png", as_png(image)))
            if seed != 4:
                members.append((f"{seed}.mask.png", as_png(mask)))
        write_tar(tmp_path / f"{name}.tar", members)
    return str(tmp_path / "train.tar"), str(tmp_path / "test.tar")


def test_the_probe_is_where_the_gradient_vanishes_and_takes_the_penalty_that_holds_outside():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(120, 6, generator=generator) * 2 + 1
    counts = torch.randint(0, 5, (120, 3), generator=generator).float()
    counts[:, 0] += 8 * (tokens[:, 0] > 1)
    held_out = torch.arange(120) % 5 == 0
    found = trained(Patches(tokens, counts, held_out), [1e-2], iterations=200)

    x, y = tokens.double().numpy(), counts.double().numpy()
    x = (x - x.mean(0)) / (x.std(0) + 1e-5)
    weights = found.weights.double().numpy()
    logits = x @ weights[:, :-1].T + weights[:, -1]
    np.testing.assert_allclose(found.logits(tokens).numpy(), logits, atol=1e-5)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (p * y.sum(1, keepdims=True) - y) / y.sum()
    gradient = np.concatenate([error.T @ x + 1e-2 * weights[:, :-1], error.sum(0)[:, None]], axis=1)
    # measured 3e-7
    assert np.abs(gradient).max() < 1e-5

    right = {}
    for l2 in (100.0, 1e-2):
        kept = Patches(tokens, counts, held_out).where(~held_out)
        probe = trained(kept, [l2], iterations=200)
        said = probe.logits(tokens[held_out]).argmax(1, keepdim=True)
        right[l2] = float(counts[held_out].gather(1, said).sum())
    assert right[1e-2] > right[100.0]
    assert trained(Patches(tokens, counts, held_out), [1e-2, 100.0], iterations=200).l2 == 1e-2


def test_crops_cover_the_larger_image_and_their_logits_are_put_back_in_place():
    image, _ = scene(0)
    side, corners = TRANSFORM.crop_corners(2)
    assert (side, corners) == (27, [(0, 0), (0, 11), (11, 0), (11, 11)])
    whole = np.asarray(image.resize((27, 27), Image.Resampling.BILINEAR))
    for crop, (top, left) in zip(TRANSFORM.crops(image, 2), corners, strict=True):
        np.testing.assert_array_equal(crop, patchify(whole[top : top + 16, left : left + 16], 4))
    np.testing.assert_array_equal(TRANSFORM.crops(image, 1)[0], TRANSFORM(image))

    # a plane stays one, but for the border of half a patch, wherever crops overlap
    rows = torch.arange(4.0).repeat_interleave(4) * 4 + 1.5  # the middle of each patch
    logits = torch.stack([rows + top for top, _ in corners])[..., None]  # [4, L, 1]
    found = enlarged(logits, TRANSFORM, (27, 27))
    assert found.shape == (1, 27, 27)
    expected = torch.arange(27.0)[:, None].expand(27, 27)
    torch.testing.assert_close(found[0, 3:11], expected[3:11])
    torch.testing.assert_close(found[0, 17:24], expected[17:24])
    # 16 = 5 * 3 + 1: what the last patch leaves over is the edge's
    odd = ImageTransform(image_size=16, patch_size=3)
    assert enlarged(torch.ones(1, 25, 2), odd, (16, 16)).eq(1).all()


def test_patches_that_tell_their_class_are_segmented(shards: tuple[str, str]) -> None:
    train, test = shards
    task = Segmentation(train=train, test=test, l2=[1e-3, 1.0], gallery=3)
    task.check()
    metrics, details = task.run(encoder_on())
    assert metrics["l2"] == 1e-3
    assert metrics["n"] == 7
    # edges lie within patches; measured 0.713 and 0.877
    assert metrics["miou"] > 0.65
    assert metrics["pixel_acc"] > 0.85
    assert [each["name"] for each in details["segment_classes"]] == ["0", "3", "7", "9"]
    pixels = sum(int((np.asarray(scene(seed)[1]) != 255).sum()) for seed in range(100, 107))
    assert sum(each["pixels"] for each in details["segment_classes"]) == pixels, "255 does not count"
    mean = sum(each["iou"] for each in details["segment_classes"]) / 4
    assert metrics["miou"] == pytest.approx(mean)
    section = task_section("dense", {"metrics": metrics, "details": details, "step": 1})
    assert len(section["segments"]) == 3
    assert section["numbers"]["pixel_acc"].endswith("%")
    # deterministic, to the last digit
    assert task.run(encoder_on()).metrics == metrics
    # the images are 16 pixels wide: more of them is seen by crops
    finer = Segmentation(train=train, test=test, l2=[1e-3], crops=2).run(encoder_on()).metrics
    assert finer["miou"] > metrics["miou"]


def test_the_pooled_output_stands_beside_each_token():
    tokens, pooled = torch.randn(8, 16, 5), torch.randn(8, 5)
    task = Segmentation(train="a", test="b", with_pooled=True, crops=2)
    found = task._tokens(VisionFeatures(tokens, pooled, None))  # [B, crops * crops, L, 2 D]
    assert found.shape == (2, 4, 16, 10)
    torch.testing.assert_close(found[1, 2, 3], torch.cat([tokens[6, 3], pooled[6]]))


def measured(rank_shards: tuple[str, str]) -> dict[str, float]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    train, test = rank_shards
    return Segmentation(train=train, test=test, l2=[1e-3, 1.0]).run(encoder_on(rank, world_size)).metrics


def test_two_ranks_measure_what_one_does(shards: tuple[str, str]) -> None:
    alone = Segmentation(train=shards[0], test=shards[1], l2=[1e-3, 1.0]).run(encoder_on()).metrics
    first, second = run_ranks(2, measured, shards)
    assert first == second
    assert first == pytest.approx(alone, abs=2e-3)


def test_mistakes_are_told(shards: tuple[str, str], tmp_path: Path) -> None:
    train, test = shards
    with pytest.raises(UserError, match=r"12 samples, such as .*, are in both train and test"):
        Segmentation(train=train, test=train, l2=[1.0]).run(encoder_on())
    with pytest.raises(UserError, match=r"shows the classes \[3\] besides those that are ignored: a probe"):
        Segmentation(train=train, test=test, ignore=[0, 7, 9, 255]).run(encoder_on())
    with pytest.raises(UserError, match="no usable image"):
        Segmentation(train=train, test=test, mask="other.png").run(encoder_on())
    (tmp_path / "names.json").write_text("[]")
    with pytest.raises(UserError, match=r"names: .* is no json of the form"):
        Segmentation(train=train, test=test, names=str(tmp_path / "names.json")).check()
    for wrong in ({"l2": []}, {"held_out": 0}, {"gallery": -1}, {"crops": 0}, {"ignore": [256]}):
        with pytest.raises(ValueError, match=r"must|between"):
            Segmentation(train=train, test=test, **wrong)


@pytest.mark.skipif(
    not MASKS.is_dir(), reason="photographs with masks (../shared/data/masks_coco) are not here"
)
def test_photographs_with_masks_are_read() -> None:
    shards = str(MASKS / "*.tar")
    task = Segmentation(
        train={"shards": shards, "select": {"held_out": 0.4}},
        test={"shards": shards, "select": {"held_out": 0.4, "part": "held_out"}},
        ignore=[0],
        l2=[1.0],
        iterations=5,
        names=str(MASKS / "classnames.json"),
    )
    metrics, details = task.run(encoder_on())
    assert 15 <= metrics["n"] <= 30
    assert 0 < metrics["pixel_acc"] < 1
    assert "person" in {each["name"] for each in details["segment_classes"]}
