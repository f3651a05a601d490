"""The ranks of bench_ring.py: gloo processes that run a contestant on command, all at once, and tell time and bytes."""

import os
import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn.functional import normalize

from kernels import sigmoid_loss
from kernels.sigmoid_loss import Exchange, exchange_seconds
from kernels.sigmoid_loss.chunked import sigmoid_loss_block
from kernels.sigmoid_loss.exchange.messages import BLOCKS, Ring

FORMS = {
    "ring": Exchange("ring"),
    "ring in bf16": Exchange("ring", dtype=torch.bfloat16),
    "node_ring": Exchange("node_ring", ranks_per_node=2),
    "grid": Exchange("grid", grid=(2, 2)),
    "all_gather": Exchange("all_gather"),
}
# the first is open_clip's default
PEERS = [f"open_clip {form}" for form in ("bidir", "shift", "reduce", "gather")]
# offset of tcpi_bytes_sent in the kernel's tcp_info
_BYTES_SENT = 200


class Run(NamedTuple):
    """The slowest rank's milliseconds, milliseconds waited of an average rank, and bytes that an average rank sent."""

    ms: float
    waited: float
    sent: float


class Ranks:
    """So many processes, each with `[rows, width]` embeddings. They end with the `with` block."""

    def __init__(self, world: int, rows: int, width: int) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pipes = [context.Pipe() for _ in range(world)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, world, port, rows, width, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()

    def run(self, command: str) -> Run:
        """Run a contestant, `hop BYTES` or `block ROWS` on all ranks at once."""
        for pipe in self._pipes:
            pipe.send(command)
        ms, waited, sent = zip(*(pipe.recv() for pipe in self._pipes), strict=True)
        return Run(max(ms), sum(waited) / len(waited), sum(sent) / len(sent))


def _serve(rank: int, world: int, port: int, rows: int, width: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    # open_clip calls collectives that torch is about to rename
    warnings.simplefilter("ignore", FutureWarning)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    inputs = _draw_inputs(rank, rows, width)
    while (command := pipe.recv()) is not None:
        pipe.send(_timed(_work(command, inputs)))
    dist.barrier()
    dist.destroy_process_group()


def _draw_inputs(rank: int, rows: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    images, noise = (torch.randn(rows, width, generator=generator) for _ in range(2))
    embeddings = [normalize(part, dim=-1) for part in (images, images + 3 * noise)]
    return [*embeddings, torch.tensor([117.0]), torch.tensor([-16.5])]


def _work(command: str, inputs: list[Tensor]) -> Callable[[], object]:
    """What a command does on this rank, prepared."""
    kind, _, detail = command.partition(" ")
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    if kind == "hop":
        outgoing, incoming = (torch.zeros(int(detail) // 4) for _ in range(2))
        ring = Ring(group, range(world))
        return lambda: ring.start([outgoing], [incoming], tag=BLOCKS).wait()
    if kind == "block":
        images, texts = (part[: int(detail)] for part in inputs[:2])
        return lambda: sigmoid_loss_block(images, texts, *inputs[2:], positives=None)
    if command in FORMS:
        exchange = FORMS[command]
        if exchange.grid is not None:
            exchange = Exchange("grid", grid=(2, world // 2))
        return lambda: _differentiate(sigmoid_loss, inputs, group=group, exchange=exchange)
    loss = SigLipLoss(rank=rank, world_size=world, dist_impl=detail)
    return lambda: _differentiate(loss, inputs)


def _differentiate(loss: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves, **options)
    torch.autograd.grad(value.sum(), leaves)


def _timed(work: Callable[[], object]) -> tuple[float, float, int]:
    """Milliseconds, milliseconds waited for others, bytes sent to them."""
    dist.barrier()
    exchange_seconds()
    sent = _bytes_sent()
    with _waits_of_peers() as waited:
        start = time.perf_counter()
        work()
        elapsed = time.perf_counter() - start
    # ours are counted by the library itself: its waits were not among those patched
    seconds = exchange_seconds() or sum(waited)
    dist.barrier()
    return 1e3 * elapsed, 1e3 * seconds, _bytes_sent() - sent


@contextmanager
def _waits_of_peers() -> Iterator[list[float]]:
    """Yields a list of the seconds that a contestant stands in collectives and in waiting for messages."""
    waited: list[float] = []

    def clocked(function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            waited.append(time.perf_counter() - start)
            return result

        return call

    post = dist.batch_isend_irecv

    def posted(operations: list) -> list:
        return [mock.Mock(wait=clocked(work.wait)) for work in post(operations)]

    names = ["all_reduce", "all_gather", "all_to_all", "scatter", "reduce_scatter"]
    with mock.patch.multiple(dist, batch_isend_irecv=posted, **{n: clocked(getattr(dist, n)) for n in names}):
        yield waited


def _bytes_sent() -> int:
    """Bytes sent so far on this process's TCP connections, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or a socket that is not of TCP
            continue
        total += struct.unpack_from("<Q", info, _BYTES_SENT)[0]
    return total
