"""Boxes of expressions measured with a decoder that says what the test chose, and images that were trained on."""

import io
import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.sentences import RelativeBox
from siglip_train.distributed.setup import World
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder
from siglip_train.evals.referring import Referring
from siglip_train.models.vision import VisionFeatures
from tests.data.shard_files import write_tar

RIGHT, WRONG = (0.0, 0.0, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)


class Finds:
    """In place of a `Captioner`: "left …" is right where it sees the image, and all else wrong."""

    def locate(self, images: VisionFeatures, texts: list[str], beams: int = 1) -> list[RelativeBox]:
        seen = images.tokens.flatten(1).any(1).tolist()
        return [
            RIGHT if text.startswith("left") and is_seen else WRONG
            for text, is_seen in zip(texts, seen, strict=True)
        ]


class Tower(torch.nn.Module):
    def vision(self, patches, grid, mask) -> VisionFeatures:
        return VisionFeatures(patches.float(), patches.float().mean(1), mask)


def encoder() -> Encoder:
    world = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    transform = ImageTransform(image_size=8, patch_size=4)
    return Encoder(
        model=Tower(), tokenizer=None, transform=transform, world=world, batch_size=3, captioner=Finds
    )


def shard(path: Path, keys: list[str]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (90, 90, 90)).save(buffer, "PNG")
    facts = {"regions": [{"box": list(RIGHT), "text": text} for text in ("left cat", "dog", "left man")]}
    members = []
    for key in keys:
        members += [(f"{key}.png", buffer.getvalue()), (f"{key}.json", json.dumps(facts).encode())]
    write_tar(path, members)
    return str(path)


def test_accuracy_and_the_images_that_were_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refcoco = shard(
        tmp_path / "val.tar",
        [
            "COCO_train2014_000000000007",
            "COCO_train2014_000000000009_2_jpg",
            "COCO_train2014_000000000011",
            "mine",
        ],
    )
    # COCO's names of 2014 and of 2017
    trained = shard(
        tmp_path / "train.tar", ["000000000007", "COCO_train2014_000000000009", "000000000012", "other"]
    )
    task = Referring(shards=refcoco, trained_on=trained)
    task.check()
    metrics = task.run(encoder()).metrics
    assert metrics == {
        "acc": pytest.approx(2 / 3), "mean_iou": pytest.approx(2 / 3), "prior_acc": 0, "n": 12,
        "trained_on_images": 2,
    }  # fmt: skip
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(
        f"2 of the 4 images of {refcoco}, such as 000000000007, are in {trained}, which"
    )

    with pytest.raises(UserError, match=r"2 of the 4 images .* set refuse_trained_on=false"):
        Referring(shards=refcoco, trained_on=trained, refuse_trained_on=True).run(encoder())
    caplog.clear()
    apart = shard(tmp_path / "apart.tar", ["000000000001", "a/mine"])
    assert Referring(shards=refcoco, trained_on=apart).run(encoder()).metrics["trained_on_images"] == 0
    assert not caplog.records
    assert "trained_on_images" not in Referring(shards=refcoco, max_samples=2).run(encoder()).metrics
    with pytest.raises(UserError, match="gone"):
        Referring(shards=refcoco, trained_on=str(tmp_path / "gone.tar")).check()
