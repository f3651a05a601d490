"""From images with captions and known boxes to a decoder: packed, annotated, trained, and shown in the report."""

import json
import tarfile
from pathlib import Path

import pytest

from data_tools.preview.pick import pick
from siglip_train import load_model
from siglip_train.data.image_file import decode
from tests.data_tools.test_verify import write_tar
from tests.forks import run_program

COCO = Path(__file__).resolve().parents[2] / "shared" / "data"


def data_tool(*arguments: object) -> str:
    """What a command of siglip-data prints."""
    result = run_program("data_tools.cli", [str(each) for each in arguments])
    assert result.returncode == 0, result.stderr
    return result.stdout


def trained(shards: Path, folder: Path, small_run: list[str], *overrides: str) -> list[dict]:
    """The metrics of a run of a tiny decoder on annotated shards, with a page of the boxes that it finds."""
    result = run_program("siglip_train.train", run_of(shards, folder, small_run, *overrides))
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def run_of(shards: Path, folder: Path, small_run: list[str], *overrides: str) -> list[str]:
    """The arguments of such a run."""
    tasks = (
        "seen", "unseen", "retrieval", "loss", "referring_unseen", "segmentation", "captions", "captions_of_several",
    )  # fmt: skip
    return [
        "experiment=siglip2_tiny_a_base",
        *(each for each in small_run if not each.startswith(("experiment", "evaluation"))),
        *(f"~evaluation.tasks.{name}" for name in tasks),
        f"data.sources.tiny.shards={shards}",
        f"evaluation.tasks.referring_seen.shards={shards}",
        "evaluation.tasks.referring_seen.first_only=false",
        "++evaluation.tasks.referring_seen.max_samples=12",
        f"run_dir={folder / 'run'}",
        *overrides,
    ]


def boxes_in(page: Path) -> int:
    """How many images the section of boxes shows."""
    return page.read_text().split("Boxes of expressions")[1].split("</section>")[0].count("<figure")


def test_annotated_images_train_a_decoder_and_bad_boxes_are_counted(
    tiny_data: Path, small_run: list[str], tmp_path: Path
) -> None:
    packed, annotated = tmp_path / "packed", tmp_path / "annotated"
    data_tool("pack", tiny_data / "validation", packed, "--split", "all", "--resize", 48, "--workers", 1)
    data_tool("regions", packed / "all", annotated, "--detector", "json:objects", "--text", "json:captions.en",
              "--field", "found", "--workers", 1)  # fmt: skip
    # a tenth of the samples with a box that is none
    with tarfile.open(annotated / "00000.tar") as archive:
        members = [(entry.name, archive.extractfile(entry).read()) for entry in archive]
    wrong = (
        [10, 10, 60, 50],
        [0.1, 0.1, 1.4, 0.5],
        [0.5, 0.1, 0.4, 0.5],
        [0.2, 0.1, 0.2, 0.5],
        [0.1, float("nan"), 1, 1],
    )
    edited, number = [], 0
    for name, data in members:
        if name.endswith(".json"):
            facts = json.loads(data)
            if number % 10 == 0:
                facts["found"] = [{"box": wrong[number // 10 % 5], "text": "red circle", "score": 1.0}]
            number += 1
            data = json.dumps(facts).encode()
        edited.append((name, data))
    training = tmp_path / "training.tar"
    write_tar(training, edited)
    rows = trained(
        annotated, tmp_path, small_run, f"data.sources.tiny.shards={training}", "data.sources.tiny.regions=json:found",
        "evaluation.tasks.referring_seen.regions=json:found", "data.max_bad_share=0.5", "stop_after_steps=4",
    )  # fmt: skip
    assert {"train/captioning/arf_loss", "train/captioning/gcap_loss"} <= {key for row in rows for key in row}
    assert any(row.get("val/referring_seen/n", 0) >= 12 for row in rows)
    bad = [value for row in rows for key, value in row.items() if key.startswith("data/bad")]
    assert max(bad) > 0, "bad boxes are bad samples"
    assert boxes_in(tmp_path / "run" / "report.html") >= 12

    arguments = run_of(
        pixels(tmp_path, edited), tmp_path / "other", small_run, "data.sources.tiny.regions=json:found",
        f"evaluation.tasks.referring_seen.shards={annotated}", "evaluation.tasks.referring_seen.regions=json:found",
    )  # fmt: skip
    refused = run_program("siglip_train.train", arguments)
    (line,) = (line for line in refused.stderr.splitlines() if line.startswith("error: "))
    assert refused.returncode == 2, refused.stderr
    assert "box in pixels" in line


def pixels(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    """The same shard with boxes in pixels alone."""
    found = [{"box": [10, 10, 60, 50], "text": "red circle"}]
    edited = [
        (name, json.dumps({**json.loads(data), "found": found}).encode() if name.endswith(".json") else data)
        for name, data in members
    ]
    write_tar(folder / "pixels.tar", edited)
    return folder / "pixels.tar"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["captions_coco", "boxes_coco"])
def test_photographs_of_coco_are_packed_annotated_learned_and_shown(
    name: str, small_run: list[str], tmp_path: Path
) -> None:
    if not (COCO / name).exists():
        pytest.skip(f"photographs with boxes (../shared/data/{name}) are not here")
    packed, annotated, model = tmp_path / "packed", tmp_path / "annotated", tmp_path / "coco.model"
    data_tool(
        "pack", COCO / name, packed, "--split", "all", "--resize", 96, "--format", "jpg", "--workers", 1
    )
    field = "json:captions" if name == "captions_coco" else "txt"
    said = data_tool(
        "regions", packed / "all", annotated, "--detector", "json:boxes", "--text", field, "--workers", 1
    )
    assert "0 bad" in said
    told = json.loads((annotated / "regions.json").read_text())
    assert told["annotated"] == told["samples"]
    assert told["with_regions"] > told["samples"] / 2
    data_tool("tokenizer", annotated, model, "--text", field, "txt", "--vocab-size", 500, "--symbols", "0123456789",
              "--workers", 1)  # fmt: skip
    rows = trained(
        annotated, tmp_path, small_run, f"tokenizer={model}", "model.text.vocab_size=500",
        f"data.sources.tiny.text={field}", "~data.sources.tiny.language", "stop_after_steps=30", "total_samples=720",
        "optim.warmup_samples=96", "checkpoint.every_steps=15", "evaluation.every_steps=30",
    )  # fmt: skip
    losses = [row["train/captioning_loss"] for row in rows if "train/captioning_loss" in row]
    # thirty steps, a third of them with a rate that rises
    assert losses[-1] < 0.95 * losses[0]
    assert boxes_in(tmp_path / "run" / "report.html") >= 12

    samples = pick(str(annotated), 4, 0, tmp_path / "cache").samples
    images = [decode(sample.members["jpg"]) for sample in samples]
    loaded = load_model(tmp_path / "run")
    boxes = loaded.locate(images, ["person"] * 4)
    assert all(left < right and top < bottom for left, top, right, bottom in boxes)
    assert len(loaded.caption(images)) == len(loaded.describe(images, boxes)) == 4
