"""Every experiment that adapts a released model trains by the short command, and changes what it says it trains."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.released_model import write_images, write_released
from siglip_train.interop.load import load_model
from tests.test_train import losses, run

TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
SIZES = {
    "vision_config": {**TOWER, "image_size": 32, "patch_size": 16},
    "text_config": {**TOWER, "vocab_size": 256, "max_position_embeddings": 8, "projection_size": 24},
}
CLASSIFICATION = ("finetune_frozen", "finetune_lora", "finetune_full")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`released`, as transformers writes it; images in `classes/COLOUR`; and with captions in `pairs`."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("adapting")
    write_released(folder / "released", SIZES)
    write_images(folder / "classes", captions=False, count=16)
    write_images(folder / "pairs", captions=True, count=16)
    return folder


def changed(before: Path, after: Path) -> set[str]:
    """The parameters that training has changed."""
    theirs, ours = (load_model(path).model.state_dict() for path in (before, after))
    assert theirs.keys() == ours.keys()
    same = {name for name in ours if ours[name].shape == theirs[name].shape}
    return {name for name in ours if name not in same or not torch.equal(ours[name], theirs[name])}


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [
        # what changes, all of it and nothing else
        ("finetune_frozen", "^$"),
        ("finetune_lora", r"^vision\.encoder\.blocks\.\d\.attention\.(query|key|value|out)\.weight$"),
        ("finetune_full", r"^vision\.(?!pool\.)"),
        ("finetune_contrastive", r"^(vision|text)\.|^logit_"),
        ("finetune_text", r"^text\.|^logit_"),
        ("adapt_resolution", r"^(vision|text)\.|^logit_"),
    ],
)
def test_two_steps_by_the_short_command(
    experiment: str, parameters: str, place: Path, tmp_path: Path
) -> None:
    if experiment == "finetune_lora":
        pytest.importorskip("peft")
    is_classification, run_dir = experiment in CLASSIFICATION, tmp_path / "run"
    source = place / ("classes" if is_classification else "pairs")
    short = [f"experiment={experiment}", f"init_from={place}/released", f"data.sources.mine.folder={source}"]
    for_a_test = [f"run_dir={run_dir}", f"data.cache_dir={place}/cache", "global_batch_size=8", "data.workers=0",
                  "stop_after_steps=2", "log.every_steps=1", "device=cpu", "data.max_bad_share=0"]  # fmt: skip
    result = run([*short, *for_a_test])
    assert result.returncode == 0, result.stderr
    assert sorted(losses(run_dir)) == [1, 2]
    log = (run_dir / "log.txt").read_text()
    assert f"from {place}/released: image tower, text tower, text rules, bilinear resizing" in log
    found = changed(place / "released", run_dir)
    everything = load_model(run_dir).model.state_dict()
    assert found == {name for name in everything if re.search(parameters, name)}
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    classes = " of 3 classes (blue, green, red)" if is_classification else ""
    assert f"source mine: 48 images{classes} of {source}, " in log
    measured = "acc1" if is_classification else "recall@1"
    assert [
        0 <= value <= 1 for name, value in last.items() if name.startswith("val/") and name.endswith(measured)
    ]
    if experiment == "adapt_resolution":
        assert "image_size 384 instead of 32: positions resampled" in log
