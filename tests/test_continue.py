"""`experiment=continue` as its user runs it: from a run and an export of it, on images with and without text."""

import json
from pathlib import Path

import pytest

from siglip_train.interop.conversion import Request, convert
from siglip_train.interop.load import load_model
from tests.forks import run_program
from tests.test_train import MODULE, records

HEADS = [
    f"+objectives.{name}.{key}={size}"
    for name in ("self_distillation", "masked_prediction")
    for key, size in (("hidden", 16), ("bottleneck", 8), ("prototypes", 24))
]


@pytest.fixture(scope="module")
def started(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, a small one of three steps, and `hf`, its export."""
    folder = tmp_path_factory.mktemp("continued")
    common = [each for each in small_run if not each.startswith(("evaluation.", "total_samples"))]
    arguments = [*common, "evaluation.tasks=null", "total_samples=72", f"run_dir={folder}/run"]
    result = run_program(MODULE, arguments)
    assert result.returncode == 0, result.stderr
    convert(folder / "run", folder / "hf", Request("hf"))
    return folder


def continued(tiny_data: Path, *more: str) -> list[str]:
    return [
        "experiment=continue", "device=cpu", "data.workers=0", "data.views.local=2", "data.views.local_patches=2",
        *HEADS,
        f"+data.sources.mine.shards={tiny_data}/validation/*.tar", "++data.sources.mine.text=json:captions.en",
        f"+data.sources.more.shards={tiny_data}/train/*.tar", "++data.sources.more.text=null",
        "global_batch_size=24", "total_epochs=null", "total_samples=72", "log.every_steps=1", *more,
    ]  # fmt: skip


def test_a_released_model_goes_on_with_captioned_and_other_images(
    started: Path, tiny_data: Path, tmp_path: Path
) -> None:
    found = {}
    for name, options in {"plain": [], "cached": ["micro_batch_size=6"]}.items():
        arguments = continued(
            tiny_data,
            f"init_from={started}/hf",
            f"run_dir={tmp_path}/{name}",
            "engine.zero_stage=2",
            *options,
        )
        result = run_program(MODULE, arguments, ranks=2)
        assert result.returncode == 0, result.stderr
        found[name] = [row for row in records(tmp_path / name) if "train/loss" in row]
    plain, cached = found["plain"], found["cached"]
    assert [row["step"] for row in plain] == [1, 2, 3]
    for one, other in zip(plain, cached, strict=True):
        for term in ("sigmoid", "self_distillation", "masked_prediction"):
            assert other[f"train/{term}_loss"] == pytest.approx(one[f"train/{term}_loss"], rel=1e-4)
    assert {"data/source/mine", "data/source/more"} < plain[-1].keys()
    # the scalars go on as they were, and no loaded weight is decayed
    scale, bias = (
        getattr(load_model(started / "hf").model, f"logit_{name}").item() for name in ("scale", "bias")
    )
    assert plain[0]["train/logit_bias"] == pytest.approx(bias, abs=1e-3)
    assert plain[0]["train/logit_scale"] == pytest.approx(2.718281828**scale, rel=1e-3)
    checkpoint = (
        tmp_path / "plain" / "checkpoints" / (tmp_path / "plain/checkpoints/LAST").read_text().strip()
    )
    pretrained = set(json.loads((checkpoint / "state.json").read_text())["pretrained"])
    assert {"model.logit_scale", "model.text.token_embedding.weight", "model.vision.pool.probe"} <= pretrained
    assert not any(name.startswith("objectives.") for name in pretrained)


def test_a_run_goes_on_with_images_alone(started: Path, tiny_data: Path, tmp_path: Path) -> None:
    arguments = continued(
        tiny_data, f"init_from={started}/run", f"run_dir={tmp_path}/run", "objectives.sigmoid=null",
        "data.sources.mine.text=null", "stop_after_steps=2",
    )  # fmt: skip
    result = run_program(MODULE, arguments)
    assert result.returncode == 0, result.stderr
    before, after = (load_model(folder).model.state_dict() for folder in (started / "run", tmp_path / "run"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed, "it learns"
    assert all(name.startswith("vision.") for name in changed), "without decay the text tower stays as it is"


def test_no_captions_at_all_is_an_error_where_the_sigmoid_loss_asks_for_them(
    started: Path, tiny_data: Path, tmp_path: Path
) -> None:
    arguments = continued(
        tiny_data, f"init_from={started}/run", f"run_dir={tmp_path}/run", "data.sources.mine.text=null"
    )
    result = run_program(MODULE, arguments)
    assert result.returncode == 2
    assert "data.sources.mine.text is null, and an objective needs captions" in result.stderr
