"""Damaged, missing and differing checkpoints: a run goes on from the newest whole one, or says why it cannot."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from siglip_train.interop.runs import checkpoints_in
from tests.faults.runs import gone_on, newest

NEWEST = "step-00000006"
BEFORE = "step-00000004"

Damage = Callable[[Path], None]


@pytest.fixture
def run_dir(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return shutil.copytree(stopped_run, tmp_path / "run")


def flip_bytes(name: str, checkpoint: Path) -> None:
    """64 bytes in the middle are others; the size is the same."""
    content = bytearray((checkpoint / name).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0x55 for byte in content[middle : middle + 64])
    (checkpoint / name).write_bytes(content)


def zero_half(name: str, checkpoint: Path) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    half = len(content) // 2
    content[half:] = bytes(len(content) - half)
    (checkpoint / name).write_bytes(content)


def cut(name: str, checkpoint: Path) -> None:
    os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)


def empty(name: str, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes(b"")


def remove(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()


def remove_all_but(name: str, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "weights")
    for path in checkpoint.iterdir():
        if path.name != name:
            path.unlink()


def edit_step(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "step": 5}))


WEIGHTS, HEADS, MOMENTS, STATE, MANIFEST = (
    "weights/model.safetensors", "heads.safetensors", "moments.safetensors", "state.json", "manifest.json",
)  # fmt: skip
DAMAGES: dict[str, tuple[Damage, str]] = {
    "64 bytes flipped in the weights": (partial(flip_bytes, WEIGHTS), "SHA-256 differs"),
    "half of the moments zeroed": (partial(zero_half, MOMENTS), "SHA-256 differs"),
    "step edited in state.json": (edit_step, "state.json has"),
    "weights cut in half": (partial(cut, WEIGHTS), "bytes, not"),
    "moments empty": (partial(empty, MOMENTS), "has 0 bytes, not"),
    "moments missing": (partial(remove, MOMENTS), "moments.safetensors is missing"),
    "heads missing": (partial(remove, HEADS), "heads.safetensors is missing"),
    "state.json missing": (partial(remove, STATE), "state.json is missing"),
    "config of the weights missing": (
        partial(remove, "weights/config.json"),
        "weights/config.json is missing",
    ),
    "manifest missing": (partial(remove, MANIFEST), "manifest.json is missing"),
    "manifest cut in half": (partial(cut, MANIFEST), "manifest.json is damaged"),
    "all files but the manifest missing": (
        lambda checkpoint: remove_all_but(MANIFEST, checkpoint),
        "is missing",
    ),
}
WORST = "64 bytes flipped in the weights"


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.fault_by_default] * (name == WORST)) for name in DAMAGES]
)
def test_a_damaged_checkpoint_is_passed_over(
    fault: str, run_dir: Path, straight_run: Path, go_on: Callable, record_fault: Callable
) -> None:
    damage, reason = DAMAGES[fault]
    damage(run_dir / "checkpoints" / NEWEST)
    results = go_on([f"run_dir={run_dir}"], ranks=2)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert f"{NEWEST} is damaged: " in results[0].stderr
    assert reason in results[0].stderr
    assert f"resuming from {run_dir}/checkpoints/{BEFORE}" in results[0].stderr
    assert (run_dir / "checkpoints" / f"{NEWEST}.set-aside").is_dir(), "nothing is thrown away"
    assert newest(run_dir) == "step-00000010"
    outcome = gone_on(run_dir, straight_run)
    assert outcome == {"lost": 0, "repeated": 2}
    record_fault(fault, ranks=2, happened="resumed from the checkpoint before it", **outcome)


def write_last(content: str | None, run_dir: Path) -> None:
    last = run_dir / "checkpoints" / "LAST"
    last.unlink() if content is None else last.write_text(content)


@pytest.mark.parametrize(
    ("fault", "content"),
    [
        ("LAST empty", ""),
        ("LAST dangling", "step-00000777\n"),
        ("LAST gone", None),
        ("LAST holds zeros", "\0" * 64),
    ],
)
def test_last_names_nothing(
    fault: str,
    content: str | None,
    run_dir: Path,
    straight_run: Path,
    go_on: Callable,
    record_fault: Callable,
) -> None:
    write_last(content, run_dir)
    results = go_on([f"run_dir={run_dir}"], ranks=2)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert f"and {NEWEST} is later: it is taken where it is whole" in results[0].stderr
    outcome = gone_on(run_dir, straight_run)
    assert outcome == {"lost": 0, "repeated": 0}
    record_fault(fault, ranks=2, happened="resumed from the newest checkpoint", **outcome)


def test_two_damaged_and_another_number_of_ranks_and_zero_stage(
    run_dir: Path, straight_run: Path, go_on: Callable, record_fault: Callable
) -> None:
    flip_bytes(WEIGHTS, run_dir / "checkpoints" / NEWEST)
    cut(STATE, run_dir / "checkpoints" / BEFORE)
    results = go_on([f"run_dir={run_dir}", "engine.zero_stage=3"], ranks=3)
    assert [result.returncode for result in results] == [0, 0, 0], results[0].stderr
    assert f"resuming from {run_dir}/checkpoints/step-00000002" in results[0].stderr
    outcome = gone_on(run_dir, straight_run)
    assert outcome == {"lost": 0, "repeated": 4}
    record_fault(
        "the two newest damaged; then 3 ranks, ZeRO 3", ranks=3, happened="resumed from the third", **outcome
    )


def test_all_damaged_ends_the_run_and_nothing_is_overwritten(
    run_dir: Path, go_on: Callable, record_fault: Callable
) -> None:
    there = checkpoints_in(run_dir / "checkpoints")
    for checkpoint in there:
        cut(MOMENTS, checkpoint)
    results = go_on([f"run_dir={run_dir}"], ranks=2)
    assert [result.returncode for result in results] == [2, 2]
    (error,) = (line for line in results[0].stderr.splitlines() if line.startswith("error: "))
    assert f"no checkpoint in {run_dir}/checkpoints is whole ({NEWEST}: moments.safetensors has" in error
    assert "to start a new run, give another run_dir, or move its checkpoints away" in error
    assert checkpoints_in(run_dir / "checkpoints") == there
    record_fault("every checkpoint damaged", ranks=2, happened="both ranks end with one line")


@pytest.mark.fault_by_default
def test_resume_null_beside_checkpoints_is_refused(
    run_dir: Path, straight_run: Path, go_on: Callable, record_fault: Callable
) -> None:
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    results = go_on([f"run_dir={run_dir}", "resume=null"], ranks=2)
    assert [result.returncode for result in results] == [2, 2]
    assert (
        f"{run_dir} holds checkpoints ({NEWEST}), and resume=null would train over them" in results[0].stderr
    )
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before
    assert all(result.returncode == 0 for result in go_on([f"run_dir={run_dir}"], ranks=2))
    record_fault(
        "resume=null beside checkpoints", ranks=2, happened="refused", **gone_on(run_dir, straight_run)
    )


def without_manifests(checkpoints: Path) -> None:
    """As an earlier version has saved them."""
    for checkpoint in checkpoints_in(checkpoints):
        (checkpoint / MANIFEST).unlink()
        state = json.loads((checkpoint / STATE).read_text())
        del state["sealed"]
        (checkpoint / STATE).write_text(json.dumps(state))


@pytest.mark.parametrize("is_cut", [False, True])
def test_checkpoints_of_an_earlier_version(
    is_cut: bool, run_dir: Path, straight_run: Path, go_on: Callable, record_fault: Callable
) -> None:
    without_manifests(run_dir / "checkpoints")
    if is_cut:
        cut(MOMENTS, run_dir / "checkpoints" / NEWEST)
    results = go_on([f"run_dir={run_dir}"], ranks=2)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert "was saved by an earlier version, without digests" in results[0].stderr
    outcome = gone_on(run_dir, straight_run)
    assert outcome == {"lost": 0, "repeated": 2 if is_cut else 0}
    fault = "no manifest anywhere (an earlier version)" + (", moments cut" if is_cut else "")
    record_fault(fault, ranks=2, happened="resumed, and said", **outcome)
