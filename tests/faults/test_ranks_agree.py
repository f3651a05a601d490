"""Ranks that see other files or run another program than rank 0: all end with one line before the first step."""

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from siglip_train.interop.runs import checkpoints_in
from siglip_train.supervision import same_program
from tests.faults.runs import gone_on
from tests.faults.test_checkpoints import MOMENTS, NEWEST, flip_bytes, zero_half


def in_own_folder(parent: Path, rank: int) -> None:
    """As on machines without a shared disk: a relative run_dir is another folder on each rank."""
    os.chdir(parent / f"machine{rank}")


def machines(parent: Path, stopped_run: Path, ranks: int) -> list[Path]:
    """The run directories of the ranks; each has all checkpoints."""
    return [Path(shutil.copytree(stopped_run, parent / f"machine{rank}" / "run")) for rank in range(ranks)]


def only_before_the_newest(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / NEWEST)
    (run_dir / "checkpoints" / "LAST").write_text("step-00000004\n")


def of_another_run(run_dir: Path) -> None:
    """Whole, and of the same step, but saved another time."""
    manifest = run_dir / "checkpoints" / NEWEST / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")


VIEWS = {
    "rank 1 sees no checkpoints": (2, {1: lambda run: shutil.rmtree(run / "checkpoints")}, 1, "there is no"),
    "rank 2 sees an old state of the disk": (3, {2: only_before_the_newest}, 2, "there is no"),
    "rank 1 sees another run's files": (2, {1: of_another_run}, 1, "holds other files there"),
    "the moments are damaged on rank 1": (
        2, {1: lambda run: zero_half(MOMENTS, run / "checkpoints" / NEWEST)}, 1, "SHA-256 differs",
    ),
    "rank 0 alone sees no checkpoints": (
        2, {0: lambda run: shutil.rmtree(run / "checkpoints")}, 1, "sees checkpoints in run/checkpoints",
    ),
}  # fmt: skip
WORST = "rank 1 sees no checkpoints"


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.fault_by_default] * (name == WORST)) for name in VIEWS]
)
def test_ranks_that_see_other_files_end_together(
    fault: str, stopped_run: Path, straight_run: Path, tmp_path: Path, go_on: Callable, record_fault: Callable
) -> None:
    ranks, faults, named, reason = VIEWS[fault]
    runs = machines(tmp_path, stopped_run, ranks)
    for rank, inject in faults.items():
        inject(runs[rank])
    before = [[path.name for path in checkpoints_in(run / "checkpoints")] for run in runs]
    results = go_on(["run_dir=run"], ranks=ranks, prepare=partial(in_own_folder, tmp_path), timeout=60)
    assert [result.returncode for result in results] == [2] * ranks
    (error,) = (line for line in results[0].stderr.splitlines() if line.startswith("error: "))
    assert f"rank {named} on " in error
    assert reason in error
    assert "on a disk that the machines share, or copy it to each" in error
    assert [[path.name for path in checkpoints_in(run / "checkpoints")] for run in runs] == before
    # the remedy
    whole = next(run for rank, run in enumerate(runs) if rank not in faults)
    assert all(result.returncode == 0 for result in go_on([f"run_dir={whole}"], ranks=ranks))
    record_fault(fault, ranks=ranks, happened="all ranks end with one line", **gone_on(whole, straight_run))


def other_torch(rank: int) -> None:
    if rank == 1:
        version = same_program.package_version
        same_program.package_version = lambda name: "2.11.0" if name == "torch" else version(name)


def other_code(rank: int) -> None:
    if rank == 1:
        digest = same_program._digest
        same_program._digest = lambda files: digest(files[1:])


def other_config(rank: int) -> None:
    if rank == 1:
        sys.argv.append("optim.lr=0.123")


PROGRAMS = {
    "another torch on rank 1": (other_torch, "the version of torch is 2.11.0 there and "),
    "another code on rank 1": (other_code, "the code of siglip_train and kernels (a digest) is "),
    "another config on rank 1": (other_config, "optim.lr is 0.123 there and "),
}


@pytest.mark.parametrize("fault", PROGRAMS)
def test_ranks_that_run_another_program_end_together(
    fault: str, tmp_path: Path, go_on: Callable, record_fault: Callable
) -> None:
    prepare, reason = PROGRAMS[fault]
    results = go_on([f"run_dir={tmp_path}/run"], ranks=2, prepare=prepare, timeout=60)
    assert [result.returncode for result in results] == [2, 2]
    for result in results:
        (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
        assert "rank 1 on " in error
        assert reason in error
        assert "start all ranks with the same command, code, packages and files" in error
    record_fault(fault, ranks=2, happened="both ranks end with one line")


def test_ranks_with_another_tokenizer_end_together(
    tiny_data: Path, tmp_path: Path, go_on: Callable, record_fault: Callable
) -> None:
    for rank in range(2):
        (tmp_path / f"machine{rank}").mkdir()
        shutil.copy(tiny_data / "tokenizer.model", tmp_path / f"machine{rank}" / "tokenizer.model")
    with (tmp_path / "machine1" / "tokenizer.model").open("ab") as file:
        file.write(b"more")
    results = go_on(
        ["tokenizer=tokenizer.model", f"run_dir={tmp_path}/run"],
        ranks=2, prepare=partial(in_own_folder, tmp_path), timeout=60,
    )  # fmt: skip
    assert [result.returncode for result in results] == [2, 2]
    assert "the content of tokenizer.model (a digest) is " in results[0].stderr
    record_fault("another tokenizer on rank 1", ranks=2, happened="both ranks end with one line")


def test_a_checkpoint_to_resume_from_that_one_rank_lacks(
    stopped_run: Path, straight_run: Path, tmp_path: Path, go_on: Callable, record_fault: Callable
) -> None:
    for rank in range(2):
        (tmp_path / f"machine{rank}").mkdir()
    shutil.copytree(stopped_run / "checkpoints" / NEWEST, tmp_path / "machine0" / "start")
    results = go_on(
        ["resume=start", f"run_dir={tmp_path}/run"],
        ranks=2,
        prepare=partial(in_own_folder, tmp_path),
        timeout=60,
    )
    assert [result.returncode for result in results] == [2, 2]
    assert f"there is no {tmp_path}/machine1/start" in results[1].stderr
    # damaged on both, a checkpoint that was asked for is not replaced by another
    shutil.copytree(tmp_path / "machine0" / "start", tmp_path / "machine1" / "start")
    for rank in range(2):
        flip_bytes(MOMENTS, tmp_path / f"machine{rank}" / "start")
    results = go_on(
        ["resume=start", f"run_dir={tmp_path}/run"],
        ranks=2,
        prepare=partial(in_own_folder, tmp_path),
        timeout=60,
    )
    assert [result.returncode for result in results] == [2, 2]
    assert "resume: the checkpoint start is damaged: moments.safetensors" in results[0].stderr
    arguments = [f"resume={stopped_run}/checkpoints/{NEWEST}", f"run_dir={tmp_path}/run"]
    assert all(result.returncode == 0 for result in go_on([*arguments, "stop_after_steps=8"], ranks=2))
    # a launcher restarts the same command: the run goes on from its own
    results = go_on(arguments, ranks=2)
    assert all(result.returncode == 0 for result in results)
    assert f"resuming from {tmp_path}/run/checkpoints/step-00000008" in results[0].stderr
    happened = "one line; one line; goes on from its own"
    record_fault("resume=PATH: rank 1 lacks it; damaged; restarted", ranks=2, happened=happened, repeated=0)
