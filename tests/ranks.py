"""Run a function on several ranks, each a process of its own, and give back what each returned."""

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.forks import free_port, server


def _entry(
    rank: int, world_size: int, port: int, backend: str, function: Callable, args: tuple, results: Any
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        # without it NCCL refuses ranks that share a GPU; not every version has it
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
        torch.cuda.set_device(rank % torch.cuda.device_count())
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
    )  # fmt: skip
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size)
        value = function(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    # as numpy, because a tensor in a queue needs its sender alive
    results.put((rank, _plain(value), None))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _next(results: Any, processes: list, deadline: float) -> tuple[int, Any, str | None]:
    """The next result; a process that died without one (an import error) fails at once and not by time-out."""
    while time.monotonic() < deadline:
        # before asking, so that what a process left behind on its way out is still found
        died = [process.name for process in processes if process.exitcode not in (None, 0)]
        try:
            return results.get(timeout=1)
        except queue.Empty:
            assert not died, f"{died} ended without a result"
    raise AssertionError("the ranks took too long")


def run_ranks(
    world_size: int, function: Callable, *args: Any, timeout: float = 240, backend: str = "gloo"
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks; return the values in rank order.

    `function` must be importable (top level of a test module); tensors come back as numpy arrays.
    """
    # the server's processes have a DeepSpeed that has chosen the CPU
    context = server() if backend == "gloo" else multiprocessing.get_context("spawn")
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_entry, args=(rank, world_size, port, backend, function, args, results))
        for rank in range(world_size)
    ]
    with mock.patch.dict(os.environ, {} if backend == "gloo" else {"DS_ACCELERATOR": "cuda"}):
        for process in processes:
            process.start()
    deadline = time.monotonic() + timeout
    try:
        values: dict[int, Any] = {}
        for _ in processes:
            rank, value, failure = _next(results, processes, deadline)
            assert failure is None, f"rank {rank} failed:\n{failure}"
            values[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [values[rank] for rank in range(world_size)]
