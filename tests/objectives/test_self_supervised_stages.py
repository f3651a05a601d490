"""A stage with a teacher as its user runs it: begun from a run without one, killed, resumed, and handed on."""

from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from siglip_train.convert import summary
from siglip_train.errors import UserError
from siglip_train.interop.conversion import Request, convert
from siglip_train.interop.load import load_model
from siglip_train.models.positions import resize_position_table
from tests.faults.injected import at, die
from tests.forks import run_program_by_rank
from tests.test_train import MODULE, losses, records, run

HEADS = [
    f"+objectives.{name}.{key}={size}"
    for name in ("self_distillation", "masked_prediction")
    for key, size in (("hidden", 16), ("bottleneck", 8), ("prototypes", 24))
]
OBJECTIVES = [
    "+objective@objectives.self_distillation=self_distillation",
    "+objective@objectives.masked_prediction=masked_prediction",
    *HEADS, "data.views.local=2", "data.views.local_patches=2",
]  # fmt: skip
# so slow that within a few steps the teacher is where it began
STILL = "ema.momentum=0.9999999"


def saved(run_dir: Path) -> dict:
    newest = run_dir / "checkpoints" / (run_dir / "checkpoints/LAST").read_text().strip()
    return {
        **load_file(newest / "heads.safetensors"),
        **{f"model.{name}": each for name, each in load_file(newest / "weights/model.safetensors").items()},
    }


def test_the_teacher_begins_as_the_student_and_is_handed_on(small_run: list[str], tmp_path: Path) -> None:
    common = [each for each in small_run if not each.startswith(("evaluation.", "total_samples"))]
    common += ["evaluation.tasks=null", "optim.schedule_samples=240"]
    carried = "carry_over=[model,heads,objectives,optimizer,position]"
    first = [*common, "total_samples=48", f"run_dir={tmp_path}/a"]
    second = [
        *common, *OBJECTIVES, "total_samples=144", f"run_dir={tmp_path}/b", f"init_from={tmp_path}/a", carried, STILL,
    ]  # fmt: skip
    third = [
        *common, *OBJECTIVES, "total_samples=168", f"run_dir={tmp_path}/c", f"init_from={tmp_path}/b", carried, STILL,
        "model.vision.image_size=96",
    ]  # fmt: skip
    assert run(first).returncode == 0
    (killed,) = run_program_by_rank(MODULE, second, ranks=1, prepare=partial(at, "data", 5, (0,), die))
    assert killed.returncode == -9, killed.stderr
    resumed = run(second)
    assert resumed.returncode == 0, resumed.stderr
    straight = run(
        [each for each in second if not each.startswith("run_dir")] + [f"run_dir={tmp_path}/straight"]
    )
    assert straight.returncode == 0, straight.stderr
    # the one that was killed had written its third step, and not yet the checkpoint that follows
    assert losses(tmp_path / "b") == losses(tmp_path / "straight")
    assert run(third).returncode == 0

    a, b, c = (saved(tmp_path / name) for name in "abc")
    stem = "vision.patch_embedding.weight"
    assert (b[f"teacher.copies.{stem}"] - a[f"model.{stem}"]).abs().max() < 1e-6
    assert (b[f"model.{stem}"] - a[f"model.{stem}"]).abs().max() > 1e-4
    # from the teacher before, and not from the student once more
    assert (c[f"teacher.copies.{stem}"] - b[f"teacher.copies.{stem}"]).abs().max() < 1e-6
    # at the other image size it is resampled as the student's
    resized = resize_position_table(b["teacher.copies.vision.position_table"], 6)
    assert (c["teacher.copies.vision.position_table"] - resized).abs().max() < 1e-6
    assert b["objectives.self_distillation.centre"].abs().sum() > 0
    assert "objectives.masked_prediction.mask_token.token" in b
    last = records(tmp_path / "c")[-1]
    assert 0 < last["train/self_distillation/prototype_entropy"] <= 1
    assert {"train/self_distillation_loss", "train/masked_prediction_loss"} <= last.keys()

    conversion = convert(tmp_path / "b", tmp_path / "ema", Request("native", weights="ema"))
    assert "the vision tower is the teacher's moving average, all else as it was trained" in summary(
        conversion
    )
    for name, tensor in load_model(tmp_path / "ema").model.state_dict().items():
        source = f"teacher.copies.{name}" if name.startswith("vision.") else f"model.{name}"
        assert tensor.equal(b[source]), name
    with pytest.raises(UserError, match="has no averaged vision tower: give a run"):
        convert(tmp_path / "a", tmp_path / "none", Request("native", weights="ema"))
    with pytest.raises(UserError, match="a classifier was trained on the trained tower"):
        Request("hf", part="classifier", weights="ema")


def test_adapters_and_a_teacher_of_the_whole_tower_are_refused(small_run: list[str], tmp_path: Path) -> None:
    alone = [*small_run, "evaluation.tasks=null", f"run_dir={tmp_path}/a", "total_samples=72"]
    assert run(alone).returncode == 0
    refused = run([
        *small_run, *OBJECTIVES, "evaluation.tasks=null", f"run_dir={tmp_path}/b", f"init_from={tmp_path}/a",
        "+adapters.rank=2",
    ])  # fmt: skip
    assert refused.returncode == 2
    assert "set ema.scope=head, so that it has heads alone, or adapters=null" in refused.stderr
