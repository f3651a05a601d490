"""What both loaders hand to torch's DataLoader: where workers come from, how they meet signals, when they end."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from siglip_train.distributed.cores import cores_of_rank

Workers = int | Literal["auto"]
# more decode faster than a GPU trains, and each takes memory
MOST_WORKERS = 12
JOB_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_SAFE_PATH = "PYTHONSAFEPATH"
# any text switches it on; this one tells that it was not the user who did
_OURS = "while workers start"


def worker_count(wanted: Workers) -> int:
    """How many processes a rank's loader has: as wanted; `auto`: one for each core of the rank, at most 12."""
    return min(cores_of_rank(), MOST_WORKERS) if wanted == "auto" else wanted


def worker_options(workers: int) -> dict[str, Any]:
    """The DataLoader's arguments about its processes.

    They are forked from a server with no threads. This process has some, of gloo or NCCL, and a lock that one of them
    holds at the moment of a fork stays locked in the child for good.
    """
    if workers == 0:
        return {"num_workers": 0}
    return {
        "num_workers": workers,
        "multiprocessing_context": _server(),
        "worker_init_fn": outlive_signals,
    }


@cache
def _server() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    # what is imported here would else be imported again by every worker, for its main module and its dataset
    ours = [name for name in sys.modules if name.startswith("siglip_train.")]
    context.set_forkserver_preload(["siglip_train.data.worker_server", *ours])
    with safe_path_for_children():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def safe_path_for_children() -> Iterator[None]:
    """Let Python processes that start meanwhile leave out the working folder, where `-c` would look for modules first.

    A file html.py there would replace Python's own. A child begins with `forget_safe_path`.
    """
    if os.environ.get(_SAFE_PATH):
        yield
        return
    os.environ[_SAFE_PATH] = _OURS
    try:
        yield
    finally:
        del os.environ[_SAFE_PATH]


def forget_safe_path() -> None:
    """Undo it in such a child: what that one starts in its turn, as a `pipe:` command, is the user's."""
    if os.environ.get(_SAFE_PATH) == _OURS:
        del os.environ[_SAFE_PATH]


def outlive_signals(_: int) -> None:
    """Let a worker go on when a terminal or a scheduler signals the whole job: the main process decides.

    That one saves a checkpoint first, and would fail if its workers died meanwhile. Its own SIGTERM ends them, and its
    death: a worker's parent is the server, so the DataLoader cannot tell that the main process was killed.
    """
    # only a wait for the signal tells who sent it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    main = end_with_parent()
    threading.Thread(target=_exit_when_told, args=(main.pid,), daemon=True).start()


def end_with_parent() -> BaseProcess:
    """End this worker when the process that asked for it dies, were it by SIGKILL; that process is returned."""
    main = multiprocessing.parent_process()
    assert main is not None, "called in a worker"
    threading.Thread(target=_exit_after, args=(main,), daemon=True).start()
    return main


def _exit_when_told(main: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)


def _exit_after(main: BaseProcess) -> None:
    main.join()
    os._exit(1)
