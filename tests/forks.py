"""Processes of the tests: forks of a server that has imported what takes long, seconds in each new process."""

import importlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch.multiprocessing as mp


def server() -> ForkServerContext:
    """The server, which has no threads: started at the first process, with the variables of that moment."""
    context = mp.get_context("forkserver")
    # what is imported before belongs to the forked workers of data loaders, should a test of theirs come first
    context.set_forkserver_preload(["tests.preload"])
    return context


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_program(
    module: str, arguments: list[str], *, ranks: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Call `main` of a module as its command does, on one rank or several; output is of all ranks, one after another.

    The exit status is the first that is not 0.
    """
    results = run_program_by_rank(module, arguments, ranks=ranks, timeout=timeout)
    out, err = "".join(result.stdout for result in results), "".join(result.stderr for result in results)
    status = next((result.returncode for result in results if result.returncode != 0), 0)
    return subprocess.CompletedProcess([module, *arguments], status, out, err)


def run_program_by_rank(
    module: str,
    arguments: list[str],
    *,
    ranks: int,
    timeout: float = 300,
    prepare: Callable[[int], None] | None = None,
    awaited: Iterable[int] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """The same with output and exit status of each rank; one that takes longer than `timeout` seconds is killed (-9).

    prepare: called in each process with its rank before `main`, to inject a fault there; it must be importable.
    awaited: the ranks to wait for, None = all; the others, which stand still for ever, are killed then.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes, files = [], []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment = {"OMP_NUM_THREADS": "1"}
            if ranks > 1:
                environment |= {name: str(value) for name, value in place.items()}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            files.append((Path(folder, f"out{rank}"), Path(folder, f"err{rank}")))
            processes.append(
                server().Process(
                    target=_main, args=(module, arguments, environment, files[-1], prepare, rank)
                )
            )
            processes[-1].start()
        try:
            for rank in range(ranks) if awaited is None else awaited:
                processes[rank].join(timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        texts = [tuple(file.read_text(errors="replace") for file in pair) for pair in files]
    return [
        subprocess.CompletedProcess([module, *arguments], process.exitcode, out, err)
        for process, (out, err) in zip(processes, texts, strict=True)
    ]


def _main(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    files: tuple[Path, Path],
    prepare: Callable[[int], None] | None,
    rank: int,
) -> None:
    for stream, path in enumerate(files, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    if prepare is not None:
        prepare(rank)
    sys.exit(importlib.import_module(module).main())
