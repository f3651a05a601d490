# ruff: noqa: E501
"""Signals at moments when a run cannot act on them, and the terminal that is lost: it saves, or leaves and says from where."""

import os
import pty
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from siglip_train.supervision.stop_signal import StopSignal
from tests.conftest import ROOT
from tests.faults import injected
from tests.faults.injected import last_line, log_of
from tests.faults.runs import MODULE, gone_on, losses, newest, train
from tests.forks import run_program_by_rank

TERM, USR1, HUP = (int(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
ENDED = {"lost": None, "repeated": None}


def _run(
    fault_run: list[str], run_dir: Path, prepare: partial, *options: str
) -> list[subprocess.CompletedProcess]:
    return run_program_by_rank(
        MODULE, [*fault_run, f"run_dir={run_dir}", *options], ranks=2, prepare=prepare, timeout=60
    )


@pytest.mark.dist
@pytest.mark.parametrize(
    ("times", "options", "reason"),
    [
        pytest.param(
            ((1.0, TERM),), ("distributed.grace_seconds=3",),
            "SIGTERM, and within 3 s (distributed.grace_seconds) the run did not come to a checkpoint: it stands at step 5",
            id="the grace period ends",
        ),
        pytest.param(((1.0, TERM), (4.0, TERM)), (), "SIGTERM, and SIGTERM 3 s later: the run leaves at once, from step 5", id="a second signal"),
        pytest.param(((1.0, USR1), (4.0, TERM)), (), "SIGUSR1, and SIGTERM 3 s later: the run leaves at once, from step 5", id="the time limit after its notice"),
    ],
)  # fmt: skip
def test_a_rank_that_waits_for_another_leaves_and_all_say_why(
    times: tuple, options: tuple[str, ...], reason: str, fault_run: list[str], tmp_path: Path, record_fault,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    prepare = partial(injected.late, "step", 5, 0, times)
    if times[0][1] == USR1:
        prepare = partial(injected.leaves_slowly, prepare)
    results = _run(fault_run, tmp_path, prepare, *options)
    status = 128 + times[0][1]
    assert [result.returncode for result in results] == [status, status]
    assert last_line(tmp_path, 0).endswith(f"ERROR error: {reason}")
    assert last_line(tmp_path, 1).split(": ", 2)[2] == reason
    assert all("all threads stand at:" in log_of(tmp_path, rank) for rank in range(2))
    assert "in hang" in log_of(tmp_path, 1)
    assert results[0].stderr.count("error: ") == results[1].stderr.count("error: ") == 1
    assert newest(tmp_path) == "step-00000004"
    record_fault(
        f"SIGTERM while rank 0 waits: {request.node.callspec.id}",
        ranks=2,
        happened="left and said why",
        **ENDED,
    )


@pytest.mark.dist
def test_a_signal_that_comes_twice_at_once_is_one(
    fault_run: list[str], straight_run: Path, tmp_path: Path, record_fault
) -> None:
    """A launcher hands on what the whole job was sent."""
    twice = partial(injected.signals, (0.0, TERM), (0.3, TERM))
    results = _run(fault_run, tmp_path, partial(injected.at, "data", 5, (1,), twice))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert last_line(tmp_path, 1).endswith("of 240 samples seen")
    assert int(newest(tmp_path).removeprefix("step-")) >= 5
    assert all(result.returncode == 0 for result in train([*fault_run, f"run_dir={tmp_path}"], ranks=2))
    record_fault(
        "SIGTERM twice within a second", ranks=2, happened="saved; went on", **gone_on(tmp_path, straight_run)
    )


@pytest.mark.dist
def test_a_checkpoint_that_is_being_written_is_finished(
    fault_run: list[str], tmp_path: Path, record_fault
) -> None:
    slow = partial(injected.slow_checkpoint, 4, ((0.0, TERM), (2.0, TERM)))
    results = _run(fault_run, tmp_path, slow, "distributed.grace_seconds=3")
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert newest(tmp_path) == "step-00000005", "the step after"
    assert max(losses(tmp_path)) <= 5
    record_fault("SIGTERM twice while a checkpoint is written", ranks=2, happened="saved", **ENDED)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("times", "options", "status", "reason"),
    [
        (((1.0, TERM),), ("distributed.grace_seconds=3",), 143, "SIGTERM, and within 3 s (distributed.grace_seconds) the run did not come to a checkpoint: it stands at start-up"),
        (((1.0, TERM), (4.0, HUP)), (), 143, "SIGTERM, and SIGHUP 3 s later: the run leaves at once, from start-up"),
        ((), ("distributed.startup_timeout_seconds=5",), 1, "rank 1 has not come within"),
    ],
    ids=["the grace period ends", "a second signal", "nobody says anything"],
)  # fmt: skip
def test_a_rank_that_does_not_come(
    times: tuple, options: tuple[str, ...], status: int, reason: str, fault_run: list[str], tmp_path: Path, record_fault,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    results = _run(fault_run, tmp_path, partial(injected.absent, times), *options)
    assert results[0].returncode == status
    assert f"error: {reason}" in last_line(tmp_path, 0)
    assert "in init_process_group" in log_of(tmp_path, 0), "the stacks"
    assert f"error: {reason}" in results[0].stderr
    record_fault(
        f"a rank never comes: {request.node.callspec.id}", ranks=2, happened="left and said why", **ENDED
    )


def test_a_lost_terminal(fault_run: list[str], straight_run: Path, tmp_path: Path, record_fault) -> None:
    """The bar is drawn on a terminal that goes away, and with it whatever else is written there."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", MODULE, *fault_run, f"run_dir={tmp_path}", "total_samples=24000"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=_take_the_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
            assert time.monotonic() < deadline, "it took no step"
            assert process.poll() is None
            time.sleep(0.2)
        os.close(ours)
        assert process.wait(60) == 0
    finally:
        process.kill()
    step = max(losses(tmp_path))
    assert newest(tmp_path) == f"step-{step:08d}"
    assert f"SIGHUP: saving at step {step} and leaving" in log_of(tmp_path, 0)
    record_fault("the terminal is lost", ranks=1, happened="saved", lost=0, repeated=0)


def _take_the_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # nohup, should the tests have been started by it, ignores this one
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal().install()
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
        stop.uninstall()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
