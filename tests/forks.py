"""Processes of the tests: forks of a server that has imported what takes long, seconds in each new process."""

import importlib
import os
import socket
import subprocess
import sys
import tempfile
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
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes, files = [], []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment = {"OMP_NUM_THREADS": "1"}
            if ranks > 1:
                environment |= {name: str(value) for name, value in place.items()}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            files += [Path(folder, f"out{rank}"), Path(folder, f"err{rank}")]
            processes.append(
                server().Process(target=_main, args=(module, arguments, environment, *files[-2:]))
            )
            processes[-1].start()
        try:
            for process in processes:
                process.join(timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        out, err = ("".join(file.read_text() for file in files[start::2]) for start in range(2))
    statuses = [process.exitcode for process in processes]
    status = next((status for status in statuses if status != 0), 0)
    return subprocess.CompletedProcess([module, *arguments], status, out, err)


def _main(module: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    for stream, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main())
