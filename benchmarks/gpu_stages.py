"""The stages of validate_gpu.py, each a process of its own: `python benchmarks/gpu_stages.py STAGE [--quick]`.

Each prints a JSON object a line as it measures. Without a GPU sizes are reduced, and what needs one says so.
"""

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import cuda_memory_mb, environment, measure, timed
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn.functional import normalize

from kernels import sigmoid_loss
from kernels.dispatch import force
from kernels.sigmoid_loss import Exchange
from kernels.sigmoid_loss.reference import sigmoid_loss_reference
from kernels.testing import rms_ratio

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = {"skipped": "not measured: there is no GPU"}
DENSE_ROWS = 32768  # above, n x n logits and what autograd keeps of them do not fit
Found = Iterator[dict[str, Any]]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ceilings(device: torch.device, *, quick: bool) -> Found:
    """Versions; the rate of library products in each dtype, and of copies, on random data."""
    yield dict(environment()) | {"cuda": str(torch.version.cuda)}
    size = (8192 if quick else 16384) if device.type == "cuda" else 256
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
        seconds = _median(partial(torch.mm, a, b), device)
        yield {"product": str(dtype), "n": size, "tflops": 2 * size**3 / seconds / 1e12}
    source = torch.empty(size * size, device=device)
    seconds = _median(partial(torch.empty_like(source).copy_, source), device)
    yield {"copy_gb_per_s": 2 * source.nbytes / seconds / 1e9}


def self_check(device: torch.device, *, quick: bool) -> Found:  # noqa: ARG001
    """Every op's own check, in every dtype."""
    if device.type != "cuda":
        yield NO_GPU
        return
    from kernels.linear_cross_entropy.chunks import _sample
    from kernels.self_check import is_right
    from kernels.sigmoid_loss.triton.sample import BlockSample

    ops = [f"sigmoid_loss_block{kind}" for kind in ("", "_value", "_scores")]
    samples: list[Any] = [BlockSample(op, weight) for op, weight in product(ops, (None, 0.0, 0.5))]
    named = [(str(sample), sample) for sample in samples] + [("linear_cross_entropy", _sample)]
    for (name, sample), dtype in product(named, (torch.float32, torch.bfloat16, torch.float16)):
        yield {"op": name, "dtype": str(dtype), "is_right": is_right(name, device, dtype, sample)}


def kernel_tests(device: torch.device, *, quick: bool) -> Found:
    """The kernels' tests, compiled."""
    if device.type != "cuda":
        yield NO_GPU
        return
    for name in ("triton_block_cases", "triton_softmax_cases", "self_check_cases"):
        command = [sys.executable, "-m", "pytest", f"tests/kernels/{name}.py", "-q", "-p", "no:cacheprovider"]
        run = subprocess.run(
            [*command, *(["-m", "not slow"] if quick else [])],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        print(run.stdout[-6000:], file=sys.stderr)
        yield {"cases": name, "status": run.returncode, "last": run.stdout.strip().splitlines()[-1:]}


def loss(device: torch.device, *, quick: bool) -> Found:
    """Value and gradients by every contestant, and the three bare products: milliseconds, memory, share of these."""
    sizes = [8192, 16384, 32768, 65536, 131072, 1048576] if device.type == "cuda" else [256]
    widths, dtypes = [768, 1152], [torch.float16, torch.bfloat16, torch.float32]
    if quick or device.type != "cuda":
        sizes, widths, dtypes = sizes[:4], widths[:1], dtypes[1:] if quick else dtypes
    for n, width, dtype in product(sizes, widths, dtypes):
        # two fp32 products have no matrix units, and a million rows take seconds
        is_long = n > (DENSE_ROWS if dtype == torch.float32 else 131072)
        if not is_long or (n, width, dtype) == (1048576, 768, torch.bfloat16):
            yield from _one_loss(n, width, dtype, device)


def _one_loss(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Found:
    inputs = _inputs(n, width, dtype, device)
    case = {"n": n, "width": width, "dtype": str(dtype)}
    rounds = 5 if n <= 131072 else 1
    baseline = _median(partial(_products, *inputs[:2]), device, rounds)
    yield case | {
        "contestant": "products",
        "ms": baseline * 1e3,
        "tflops": 6 * n * n * width / baseline / 1e12,
    }
    truth = _differentiate(sigmoid_loss_reference, [part.double() for part in inputs]) if n <= 8192 else None
    for name, contestant in _contestants(n, dtype, device).items():
        run = partial(_differentiate, contestant, inputs)
        try:
            seconds, found = _median(run, device, rounds), run()
        except Exception as error:  # a peer that does not run here, or runs out of memory
            yield case | {"contestant": name, "failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        row = case | {"contestant": name, "ms": seconds * 1e3, "of_products": baseline / seconds}
        if device.type == "cuda":
            row["memory_mb"] = cuda_memory_mb(run)
        if truth is not None:
            row["errors"] = [rms_ratio(a.reshape(b.shape), b) for a, b in zip(found, truth, strict=True)]
        yield row


def _contestants(n: int, dtype: torch.dtype, device: torch.device) -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": _by_triton if device.type == "cuda" else sigmoid_loss}
    if dtype != torch.float32:
        found["ours from fp32"] = partial(_from_fp32, found["ours"], dtype)
    try:
        rival = importlib.import_module("siglip_kernel").fused_siglip_loss
        found["siglip-kernel"] = lambda images, texts, scale, bias: rival(images, texts, scale.log(), bias)
    except ImportError:
        pass
    if n <= DENSE_ROWS:
        found["open_clip"] = SigLipLoss()
        if device.type == "cuda":
            found["open_clip compiled"] = torch.compile(SigLipLoss())
    return found


def _by_triton(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    with force("triton"):
        return sigmoid_loss(images, texts, scale, bias, **options)


def _from_fp32(ours: Callable[..., Tensor], dtype: torch.dtype, *inputs: Tensor) -> Tensor:
    return ours(inputs[0].float(), inputs[1].float(), *inputs[2:], compute_dtype=dtype)


def tuning(device: torch.device, *, quick: bool) -> Found:
    """The tile and chunk that trials choose."""
    if device.type != "cuda":
        yield NO_GPU
        return
    from kernels.sigmoid_loss.triton.block import tune

    for width, dtype in product(
        [768] if quick else [768, 1152], (torch.float16, torch.bfloat16, torch.float32)
    ):
        choice = tune(32768, 32768, width, dtype)
        yield {
            "width": width,
            "dtype": str(dtype),
            "tile": choice.tile._asdict(),
            "chunk_rows": choice.chunk_rows,
        }


def graph_capture(device: torch.device, *, quick: bool) -> Found:  # noqa: ARG001
    """A captured loss, replayed on other inputs, against the same without a graph."""
    if device.type != "cuda":
        yield NO_GPU
        return
    inputs = _inputs(4096, 768, torch.bfloat16, device)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _differentiate(sigmoid_loss, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = sigmoid_loss(*leaves)
        captured = [value.detach(), *torch.autograd.grad(value, leaves)]
    with torch.no_grad():
        leaves[0].copy_(normalize(torch.randn_like(leaves[0]), dim=-1))
    graph.replay()
    expected = _differentiate(sigmoid_loss, leaves)
    torch.cuda.synchronize()
    yield {"errors": [rms_ratio(found, true) for found, true in zip(captured, expected, strict=True)]}


def training(device: torch.device, *, quick: bool) -> Found:
    """The trainer's own step under each way to shard and speed it up: milliseconds, MFU, memory, waits of the host."""
    from training_steps import VARIANTS, config_of, our_step

    from siglip_train.distributed.setup import init_world
    from siglip_train.metrics import peak_flops
    from siglip_train.models.flops import flops_per_pair

    world = init_world("auto")
    for name in list(VARIANTS)[:1] if quick else VARIANTS:
        if name == "compiled" and device.type != "cuda":
            yield {"step": name} | NO_GPU
            continue
        config, pairs = config_of(device)
        engine, step = our_step(name, config, pairs, world)
        timings = measure(
            {name: partial(timed, step, device)}, rounds=5 if device.type == "cuda" else 1, warmup=2
        )
        milliseconds = timings[name].quantile(0.5)
        flops = pairs * flops_per_pair(config) / milliseconds * 1e3
        peak = peak_flops(device)
        row = {"step": name, "pairs": pairs, "ms": milliseconds, "tflops": flops / 1e12}
        if peak is not None:
            row |= {"mfu": flops / peak, "memory_mb": cuda_memory_mb(step), "waits": _waits(step)}
        yield row
        engine.destroy()
        del engine, step
    dist.destroy_process_group()


def _waits(step: Callable[[], object]) -> int:
    """How often the host waits for the GPU in a step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def ring(device: torch.device, *, quick: bool) -> Found:
    """Each form of exchange against float64: ranks that share one GPU by NCCL where it lets them, else by gloo."""
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    for world in (2,) if quick or device.type != "cuda" else (2, 4):
        with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            try:
                mp.spawn(_ring_rank, (world, port, device.type, folder), nprocs=world)
            except Exception as error:  # of a rank: whatever the library says
                yield {"ranks": world, "skipped": f"{error}".strip().splitlines()[-1][:300]}
                continue
            yield from map(json.loads, (Path(folder) / "found").read_text().splitlines())


def _ring_rank(rank: int, world: int, port: int, kind: str, folder: str) -> None:
    device = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
    )
    n = 512 if kind == "cuda" else 24
    whole = _inputs(n * world, 64, torch.float32, device)
    rounded = [part.half().double() if part.ndim == 2 else part.double() for part in whole]
    truth = _differentiate(sigmoid_loss_reference, rounded)
    mine = slice(rank * n, (rank + 1) * n)
    for form in ("ring", "node_ring", "grid", "all_gather"):
        options: dict[str, Any] = {
            "node_ring": {"ranks_per_node": world // 2},
            "grid": {"grid": (world // 2, 2)},
        }
        exchange = Exchange(form, **options.get(form, {}))
        leaves = [whole[0][mine], whole[1][mine], *whole[2:]]
        call = partial(sigmoid_loss, group=dist.group.WORLD, exchange=exchange, compute_dtype=torch.float16)
        _, images, texts, *_ = _differentiate(call, leaves)
        errors = [
            rms_ratio(found, world * true[mine])
            for found, true in zip((images, texts), truth[1:3], strict=True)
        ]
        if rank == 0:
            with (Path(folder) / "found").open("a") as file:
                print(json.dumps({"ranks": world, "form": form, "errors": errors}), file=file)
    dist.destroy_process_group()


def against_open_clip(device: torch.device, *, quick: bool) -> Found:
    """The training step of bench_step.py: both programs in turns."""
    import bench_step

    case = bench_step.CASES[device.type][0]
    yield {"note": bench_step.check_equal_work(case, device)}
    if device.type != "cuda":
        return
    for row in bench_step.compare(0, case.precisions[0], device, 3 if quick else 10):
        yield {"case": row.case, "contestant": row.contestant, "ms": row.p50, "memory_mb": row.memory_mb}


# with seconds that each may take
STAGES: dict[str, tuple[Callable[..., Found], int]] = {
    "ceilings": (ceilings, 40),
    "self_check": (self_check, 90),
    "loss": (loss, 130),
    "kernel_tests": (kernel_tests, 150),
    "training": (training, 120),
    "ring": (ring, 60),
    "graph_capture": (graph_capture, 40),
    "against_open_clip": (against_open_clip, 90),
    "tuning": (tuning, 90),
}


def _inputs(n: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Correlated unit vectors at the scale and bias of a trained model, where hard pairs exist."""
    generator = torch.Generator(device).manual_seed(0)
    images, noise = (torch.randn(n, width, generator=generator, device=device) for _ in range(2))
    embeddings = [normalize(part, dim=-1).to(dtype) for part in (images, images + 3 * noise)]
    return [*embeddings, *(torch.tensor(value, device=device) for value in (117.0, -16.5))]


def _differentiate(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def _products(images: Tensor, texts: Tensor) -> None:
    """The three products in chunks, with one buffer."""
    buffer = images.new_empty(min(len(images), 4096), len(texts))
    for chunk in images.split(len(buffer)):
        part = torch.mm(chunk, texts.T, out=buffer[: len(chunk)])
        torch.mm(part, texts)
        torch.mm(part.T, chunk)


def _median(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Seconds: the median, after one or two runs that compile."""
    return (
        measure({"": partial(timed, run, device)}, rounds=rounds, warmup=min(2, rounds))[""].quantile(0.5)
        / 1e3
    )


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage, _ = STAGES[arguments.stage]
    for row in stage(device, quick=arguments.quick):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
