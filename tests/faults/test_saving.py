"""Faults while a checkpoint is saved: killed at any moment, a full disk, a disk that fails, a folder that stays."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from siglip_train.checkpoints import write
from siglip_train.files import manifest
from siglip_train.interop.runs import checkpoints_in, step_of
from tests.faults.injected import hurry
from tests.faults.runs import gone_on

SAVE = 2  # the save that the fault comes in: of step 4


def at(module: Any, name: str, fault: Callable[..., None], *, call: int, after: bool = False) -> None:
    """Put `fault(*arguments)` before, or `after`, a given call of `module.name` in this process."""
    function, calls = getattr(module, name), 0

    def replaced(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            fault(*arguments)
        value = function(*arguments, **options)
        if calls == call and after:
            fault(*arguments)
        return value

    setattr(module, name, replaced)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_error(number: int, *_: Any) -> None:
    raise OSError(number, os.strerror(number))


# two tensor files of the checkpoint itself (moments, heads), a manifest and a rename each; the folder of the weights is
# renamed too
MOMENTS: dict[str, Callable[[], None]] = {
    "before the moments are written": lambda: at(write, "write_tensors", die, call=2 * SAVE - 1),
    "after the moments": lambda: at(write, "write_tensors", die, call=2 * SAVE - 1, after=True),
    "before the manifest": lambda: at(manifest, "write_text", die, call=SAVE),
    "before the folder gets its name": lambda: at(write, "put_folder", die, call=SAVE),
    "before LAST names it": lambda: at(write, "write_text", die, call=SAVE),
    "after LAST names it": lambda: at(write, "write_text", die, call=SAVE, after=True),
}


def kill_rank_0(moment: str, rank: int) -> None:
    hurry()
    if rank == 0:
        MOMENTS[moment]()


@pytest.mark.parametrize("moment", MOMENTS)
def test_rank_0_is_killed_while_it_saves(
    moment: str, straight_run: Path, tmp_path: Path, go_on: Callable, record_fault: Callable
) -> None:
    results = go_on(
        [f"run_dir={tmp_path}/run"], ranks=2, prepare=partial(kill_rank_0, moment), may_crash=True, timeout=60
    )
    assert results[0].returncode == -signal.SIGKILL
    results = go_on([f"run_dir={tmp_path}/run"], ranks=2)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    outcome = gone_on(tmp_path / "run", straight_run)
    assert outcome["repeated"] == (0 if moment.endswith("LAST names it") else 2)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "nothing is left of what was not complete"
    record_fault(f"killed {moment}", ranks=2, happened="resumed from the newest whole one", **outcome)


DISKS: dict[str, tuple[Callable[[], None], str]] = {
    "disk full in the moments": (
        lambda: at(write, "write_tensors", partial(raise_error, errno.ENOSPC), call=2 * SAVE - 1),
        "No space left on device",
    ),
    "disk full in the manifest": (
        lambda: at(manifest, "write_text", partial(raise_error, errno.ENOSPC), call=SAVE),
        "No space left on device",
    ),
    "the disk fails to flush": (
        lambda: at(manifest, "flush", partial(raise_error, errno.EIO), call=3 * SAVE),
        "Input/output error",
    ),
    "a rename fails": (
        lambda: at(write, "put_folder", partial(raise_error, errno.EROFS), call=SAVE),
        "Read-only file system",
    ),
}


def fail_on_rank_0(fault: str, rank: int) -> None:
    if rank == 0:
        DISKS[fault][0]()


@pytest.mark.parametrize("fault", DISKS)
def test_a_checkpoint_that_cannot_be_written_ends_all_ranks_and_harms_no_other(
    fault: str, straight_run: Path, tmp_path: Path, go_on: Callable, record_fault: Callable
) -> None:
    results = go_on([f"run_dir={tmp_path}/run"], ranks=2, prepare=partial(fail_on_rank_0, fault), timeout=60)
    assert [result.returncode for result in results] == [2, 2]
    for result in results:
        (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
        assert "cannot write a checkpoint to " in error
        assert DISKS[fault][1] in error
    saved = list(map(step_of, checkpoints_in(tmp_path / "run" / "checkpoints")))
    assert saved in ([2], []), "the first is untouched, where it was not the one that failed"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), (
        "what was written of it does not fill the disk"
    )
    results = go_on([f"run_dir={tmp_path}/run"], ranks=2)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    record_fault(
        fault, ranks=2, happened="all ranks end with one line", **gone_on(tmp_path / "run", straight_run)
    )


def keep_the_first(rank: int) -> None:
    remove = shutil.rmtree

    def refuse(path: Path, **options: Any) -> None:
        if Path(path).name == "step-00000002":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        remove(path, **options)

    shutil.rmtree = refuse


def test_an_old_checkpoint_that_cannot_be_removed(
    straight_run: Path, tmp_path: Path, go_on: Callable, record_fault: Callable
) -> None:
    results = go_on([f"run_dir={tmp_path}/run", "checkpoint.keep=1"], ranks=2, prepare=keep_the_first)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert "cannot remove" in results[0].stderr
    assert list(map(step_of, checkpoints_in(tmp_path / "run" / "checkpoints"))) == [10, 2]
    record_fault(
        "an old checkpoint cannot be removed", ranks=2, happened="said once, the run goes on",
        **gone_on(tmp_path / "run", straight_run),
    )  # fmt: skip


def test_what_a_checkpoint_consists_of_is_flushed_before_it_gets_its_name(
    tmp_path: Path, go_on: Callable, record_fault: Callable
) -> None:
    """What a power failure leaves cannot be seen here; that nothing is renamed before it is flushed can."""
    results = go_on([f"run_dir={tmp_path}/run"], ranks=2, prepare=partial(note, tmp_path / "events"))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    lines = [line.split(" ", 1) for line in (tmp_path / "events").read_text().splitlines()]
    flushed: set[str] = set()
    names = []
    for event, path in lines:
        if event == "fsync":
            flushed.add(path)
        else:
            names.append({name.removeprefix(path) for name in flushed if name.startswith(path)})
    expected = {"heads.safetensors", "manifest.json", "moments.safetensors", "state.json", "weights"}
    assert all(expected | {"weights/model.safetensors"} <= found for found in names), names
    assert len(names) == 5, "a checkpoint every two of ten steps"
    record_fault("power failure after a rename (order of flushes)", ranks=2, happened="all is flushed before")


def note(file: Path, rank: int) -> None:
    """Write down what is flushed and which folder of a checkpoint is renamed, in order."""
    if rank != 0:
        return
    fsync, replace = os.fsync, os.replace

    def write(event: str, path: str) -> None:
        with file.open("a") as stream:
            stream.write(f"{event} {path}\n")

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        write("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

    def noted_replace(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".step-"):
            write("rename", f"{source}/")
        replace(source, target)

    os.fsync, os.replace = noted_fsync, noted_replace
