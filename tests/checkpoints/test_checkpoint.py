"""Checkpoints are complete or absent, the newest are kept, and damage is said in one line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from siglip_train import engine_state
from siglip_train.checkpoints import save
from siglip_train.checkpoints.load import fault_of, read_checkpoint, restore_weights
from siglip_train.checkpoints.save import CheckpointConfig, Checkpoints
from siglip_train.checkpoints.write import Progress
from siglip_train.errors import UserError
from siglip_train.interop.runs import checkpoints_in, newest_checkpoint, step_of


class TrainingStandIn(nn.Module):
    """A module of the shape of TrainingModel: `model.` and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 3)
        self.head = nn.Linear(3, 1)


@pytest.fixture
def saver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    module = TrainingStandIn()
    monkeypatch.setattr(engine_state, "gather_weights", lambda _: dict(module.state_dict()))
    monkeypatch.setattr(engine_state, "gather_moments", lambda _: {"model.weight.exp_avg": torch.ones(3, 2)})
    return Checkpoints(tmp_path, CheckpointConfig(every_steps=2, keep=2), write_weights)


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(map(step_of, checkpoints_in(run_dir / "checkpoints")))


def write_weights(folder: Path, state: dict) -> None:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")


ENGINE = SimpleNamespace(global_rank=0)


def test_the_newest_are_kept_and_last_names_the_newest(saver: Checkpoints, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        assert saver.is_due(step)
        assert not saver.is_due(step + 1)
        saver.save(ENGINE, Progress(step, 10 * step, {"seen": step}, pretrained=("model.a", "model.b")))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "LAST", "step-00000004", "step-00000006"
    ]  # fmt: skip
    found = newest_checkpoint(tmp_path)
    saved = read_checkpoint(found)
    assert saved.progress == Progress(6, 60, {"seen": 6}, ("model.a", "model.b"))
    module = TrainingStandIn()
    restore_weights(module, saved, found)
    assert torch.equal(module.head.weight, saved.weights["head.weight"])


def test_a_checkpoint_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Checkpoints(tmp_path, CheckpointConfig(every_steps=0, every_minutes=10), write_weights)
    assert not saver.is_due(100)
    now = save.time.monotonic()
    monkeypatch.setattr(save.time, "monotonic", lambda: now + 601)
    assert saver.is_due(101)


def test_a_write_that_fails_leaves_the_earlier_one(saver: Checkpoints, tmp_path: Path) -> None:
    saver.save(ENGINE, Progress(2, 20))

    def full_disk(folder: Path, state: dict) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    saver._folder._write_weights = full_disk
    with pytest.raises(UserError, match="No space left on device; earlier ones are untouched"):
        saver.save(ENGINE, Progress(4, 40))
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"LAST", "step-00000002"}, "nothing of the other takes room"
    assert newest_checkpoint(tmp_path).name == "step-00000002"


@pytest.mark.parametrize("name", ["state.json", "weights/model.safetensors", "moments.safetensors"])
def test_damage_is_named(saver: Checkpoints, tmp_path: Path, name: str) -> None:
    saver.save(ENGINE, Progress(2, 20))
    found = newest_checkpoint(tmp_path)
    (found / name).write_bytes((found / name).read_bytes()[:7])
    with pytest.raises(UserError, match="step-00000002 cannot be read"):
        read_checkpoint(found)


def test_multiples_of_keep_every_steps_stay(saver: Checkpoints, tmp_path: Path) -> None:
    saver._config = CheckpointConfig(keep=1, keep_every_steps=4)
    for step in (2, 4, 6, 8, 10):
        saver.save(ENGINE, Progress(step, 10 * step))
    assert saved_steps(tmp_path) == [4, 8, 10]


def test_fewer_than_keep_all_stay(saver: Checkpoints, tmp_path: Path) -> None:
    saver._config = CheckpointConfig(keep=4)
    for step in (2, 4, 6):
        saver.save(ENGINE, Progress(step, 10 * step))
    assert saved_steps(tmp_path) == [2, 4, 6]


def test_the_age_of_a_checkpoint_decides_and_not_its_name(saver: Checkpoints, tmp_path: Path) -> None:
    """Of later steps than the one just saved, which a run that went back has left, none takes its place."""
    for step in (90, 100):
        saver.save(ENGINE, Progress(step, 10 * step))
    for step in (10, 20, 30):
        saver.save(ENGINE, Progress(step, 10 * step))
        assert (tmp_path / "checkpoints" / "LAST").read_text() == f"step-{step:08d}\n"
        assert step in saved_steps(tmp_path)
    assert saved_steps(tmp_path) == [20, 30]


def test_a_checkpoint_that_cannot_be_removed_stays_and_is_told_once(
    saver: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = shutil.rmtree

    def refuse(path: Path, **options: bool) -> None:
        if path.name == "step-00000002":
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (2, 4, 6, 8):
        saver.save(ENGINE, Progress(step, 10 * step))
    assert saved_steps(tmp_path) == [2, 6, 8]
    (line,) = (record.getMessage() for record in caplog.records)
    assert "cannot remove" in line
    assert "step-00000002: PermissionError" in line


def test_a_step_saved_again_takes_the_place_of_the_earlier(saver: Checkpoints, tmp_path: Path) -> None:
    saver.save(ENGINE, Progress(2, 20))
    saver.last_step = None
    (tmp_path / "checkpoints/step-00000002/state.json").write_text("damaged")
    saver.save(ENGINE, Progress(2, 20))
    assert fault_of(newest_checkpoint(tmp_path)) is None
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"LAST", "step-00000002"}


def test_another_shape_is_named(saver: Checkpoints, tmp_path: Path) -> None:
    saver.save(ENGINE, Progress(2, 20))
    found = newest_checkpoint(tmp_path)
    module = TrainingStandIn()
    module.model = nn.Linear(5, 3)
    with pytest.raises(UserError, match=r"model.weight is \(3, 2\) there and \(3, 5\) here"):
        restore_weights(module, read_checkpoint(found), found)


def test_nothing_executable_is_stored(saver: Checkpoints, tmp_path: Path) -> None:
    saver.save(ENGINE, Progress(2, 20))
    files = [path for path in newest_checkpoint(tmp_path).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert json.loads((tmp_path / "checkpoints/step-00000002/state.json").read_text())["samples_seen"] == 20
