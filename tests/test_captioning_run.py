"""A run with the decoder, from training on two ranks to captions and boxes of its export."""

import json
from pathlib import Path

import pytest
from PIL import Image

from siglip_train import load_model
from siglip_train.convert import summary
from siglip_train.errors import UserError
from siglip_train.evals.referring import iou
from siglip_train.interop.conversion import Request, convert
from tests.forks import run_program


def test_a_decoder_is_trained_measured_resumed_exported_and_used(
    small_run: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    arguments = [
        "experiment=siglip2_tiny_a_base",
        *(each for each in small_run if not each.startswith(("experiment", "evaluation"))),
        *(
            f"evaluation.tasks.{name}=null"
            for name in ("seen", "unseen", "retrieval", "loss", "referring_unseen", "captions")
        ),
        f"evaluation.tasks.segmentation.train={tiny_data}/validation/*.tar",
        f"evaluation.tasks.segmentation.test={tiny_data}/referring_seen/*.tar",
        "evaluation.tasks.segmentation.iterations=3",
        f"evaluation.tasks.referring_seen.shards={tiny_data}/referring_seen/*.tar",
        "++evaluation.tasks.referring_seen.max_samples=6",
        f"evaluation.tasks.captions_of_several.shards={tiny_data}/referring_seen/*.tar",
        "++evaluation.tasks.captions_of_several.max_samples=5",
        # whose sentences are shorter than usual, as the run's are
        "++evaluation.tasks.held_out._target_=siglip_train.evals.objective_loss.ObjectiveLoss",
        f"++evaluation.tasks.held_out.shards={tiny_data}/validation/*.tar",
        "++evaluation.tasks.held_out.objective=captioning",
        "++evaluation.tasks.held_out.text=json:captions.en",
        "++evaluation.tasks.held_out.regions=json:regions",
        "++evaluation.tasks.held_out.max_samples=8",
        "engine.zero_stage=3",
        f"run_dir={tmp_path / 'run'}",
    ]
    first = run_program("siglip_train.train", [*arguments, "stop_after_steps=3"], ranks=2)
    assert first.returncode == 0, first.stderr
    assert "objective captioning: " in first.stderr + first.stdout
    result = run_program("siglip_train.train", [*arguments, "stop_after_steps=6"], ranks=2)
    assert result.returncode == 0, result.stderr
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/captioning_loss"] for row in logged if "train/captioning_loss" in row]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert {f"train/captioning/{task}_loss" for task in ("cap", "arf", "gcap")} <= {
        key for row in logged for key in row
    }
    assert any(row.get("val/referring_seen/n") == 6 for row in logged)
    assert all(0 < row["val/segmentation/miou"] < 1 for row in logged if "val/segmentation/n" in row)
    assert any(row.get("val/segmentation/n") == 200 for row in logged)
    held_out = next(row for row in reversed(logged) if "val/held_out/loss" in row)
    tasks = [held_out[f"val/held_out/{task}_loss"] for task in ("cap", "arf", "gcap")]
    assert held_out["val/held_out/loss"] == pytest.approx(sum(tasks) / 3)
    captions = next(row for row in reversed(logged) if "val/captions_of_several/n" in row)
    assert captions["val/captions_of_several/n"] == 5
    assert (
        captions["val/captions_of_several/truthful_acc"] >= captions["val/captions_of_several/complete_acc"]
    )
    page = (tmp_path / "run" / "report.html").read_text()
    shown = page.split("Boxes of expressions")[1].split("</section>")[0]
    assert shown.count("<figure") == 6, "the report shows both boxes of each text"

    assert page.split("bold: the decoder's")[1].split("</section>")[0].count('<img src="data:') == 5

    loaded = load_model(tmp_path / "run")
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "white")]
    boxes = loaded.locate(images, ["red circle", "blue star"], beams=2)
    assert all(left < right and top < bottom for left, top, right, bottom in boxes)
    said = loaded.caption(images), loaded.describe(images, boxes)

    kept = convert(tmp_path / "run", tmp_path / "native", Request("native"))
    assert not kept.left_out
    again = load_model(tmp_path / "native")
    assert again.locate(images, ["red circle", "blue star"], beams=2) == boxes
    assert (again.caption(images), again.describe(images, boxes)) == said

    other = convert(tmp_path / "run", tmp_path / "open_clip", Request("open_clip"))
    assert "the decoder has no form in open_clip: it is left out; --to native keeps it" in summary(other)
    with pytest.raises(UserError, match="open_clip has no decoder"):
        load_model(tmp_path / "open_clip").locate(images[:1], "red circle")
    with pytest.raises(UserError, match="2 images and 1 texts or boxes"):
        loaded.locate(images, "red circle")
    with pytest.raises(UserError, match="a box is"):
        loaded.describe(images[:1], [(0.0, 0.5, 10.0, 20.0)])


def test_overlap_of_boxes() -> None:
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
    assert iou((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
