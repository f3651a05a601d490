"""Faults of one rank at one moment of a run: for `prepare=` of `runs.train`, which calls it in each rank."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from siglip_train.checkpoints.write import CheckpointFolder
from siglip_train.distributed import peers
from siglip_train.distributed.standing import Phase, Standing
from siglip_train.supervision import stop_signal
from siglip_train.supervision.rank_log import RankLog


def at(phase: str, step: int, ranks: tuple[int, ...], fault: Callable[[], None], rank: int) -> None:
    """Let `fault` happen on `ranks` when they come to this phase of this step."""
    hurry()
    if rank not in ranks:
        return
    come = Standing.at

    def then(self: Standing, now: Phase, number: int | None = None) -> None:
        come(self, now, number)
        if self._now[:2] == (phase, step):
            fault()

    Standing.at = then  # type: ignore[method-assign]


def hurry() -> None:
    """Ranks tell of themselves more often than in earnest, and count as silent sooner."""
    peers._EVERY, peers._SILENT = 0.5, 4.0
    stop_signal._SAME, stop_signal._POLL = 1.5, 0.2


def crash() -> None:
    """What nobody foresaw."""
    raise KeyError("a name that is not there")


def die() -> None:
    """As the system ends a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """As a debugger does, or a machine that stands still."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """Never comes back, but other threads run."""
    time.sleep(3600)


def log_of(run_dir: Path, rank: int) -> str:
    """The log of a rank."""
    return (run_dir / ("log.txt" if rank == 0 else f"logs/rank-{rank}.txt")).read_text()


def last_line(run_dir: Path, rank: int) -> str:
    """Why it says that it has ended."""
    return log_of(run_dir, rank).splitlines()[-1]


def signals(*times: tuple[float, int]) -> None:
    """This process is sent signals after so many seconds each, whatever its main thread is at."""
    for seconds, number in times:
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def late(phase: str, step: int, rank: int, times: tuple[tuple[float, int], ...], this_rank: int) -> None:
    """Rank 1 hangs at a moment; at the same, `rank` is sent signals."""
    at(phase, step, (rank,), partial(signals, *times), this_rank)
    at(phase, step, (1,), hang, this_rank)


def leaves_slowly(fault: Callable[[int], None], rank: int) -> None:
    """Beside `fault`, rank 0 takes its time to leave, so that its main thread meets the end of rank 1 before."""
    fault(rank)
    leave = RankLog.leave

    def slowly(self: RankLog, reason: str, status: int, *, stacks: bool) -> None:
        time.sleep(2)
        leave(self, reason, status, stacks=stacks)

    if rank == 0:
        RankLog.leave = slowly  # type: ignore[method-assign]


def absent(times: tuple[tuple[float, int], ...], rank: int) -> None:
    """Rank 1 does not come to where the ranks meet; rank 0 is sent signals meanwhile."""
    hurry()
    if rank == 1:
        # before it has met the others, so that for them it is as one that never was started
        os._exit(7)
    # nohup, should the tests have been started by it, ignores this one
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    join = dist.init_process_group

    def joined(*args: Any, **options: Any) -> None:
        signals(*times)
        join(*args, **options)

    dist.init_process_group = joined


def slow_checkpoint(step: int, times: tuple[tuple[float, int], ...], rank: int) -> None:
    """Rank 0 takes six seconds to write the checkpoint of a step, and is sent signals meanwhile."""
    hurry()
    write = CheckpointFolder.write

    def slowly(self: Any, weights: Any, moments: Any, progress: Any) -> Path:
        if progress.step == step:
            signals(*times)
            time.sleep(6)
        return write(self, weights, moments, progress)

    if rank == 0:
        CheckpointFolder.write = slowly  # type: ignore[method-assign]


def slow_data(rank: int) -> None:
    """Rank 1 waits a second for each batch."""
    if rank == 1:
        for step in range(1, 11):
            at("data", step, (1,), partial(time.sleep, 1.0), rank)
