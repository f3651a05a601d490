"""A training step in micro-batches: this project's gradient cache against open_clip's `--accum-freq`, and each whole.

The peer is open_clip_train's own `train_one_epoch` over as many micro-batches as make one optimizer step. Same towers,
weights and batch as in bench_step.py, AdamW and clipping on both sides; this project runs under DeepSpeed, as it does
in training. Before timing, the update of either form is compared with that of the whole batch.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from bench_step import Case, build_losses, draw_inputs
from harness import (
    Row,
    finish,
    measure,
    peak_resident_memory,
    reset_peak_resident_memory,
    rows,
    run_child,
    timed,
)
from open_clip.loss import SigLipLoss
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn

from siglip_train import engine as engines
from siglip_train import loop
from siglip_train.distributed.setup import World, init_world
from siglip_train.gradient_cache import cached_step
from siglip_train.supervision.stop_signal import StopSignal

BASELINES = {"ours cached": "open_clip accumulated", "ours whole": "open_clip whole"}
CACHED = ("ours cached", "open_clip accumulated")
ALL = (*CACHED, "ours whole", "open_clip whole")
CLIP_NORM = 1.0
Optimizer = Callable[[Any], torch.optim.Optimizer]
Step = Callable[[], object]


@dataclass(frozen=True)
class Split:
    """A batch (`case.batch_size`) in micro-batches."""

    case: Case
    micro_batch_size: int
    contestants: tuple[str, ...] = ALL

    @property
    def name(self) -> str:
        """As in the results."""
        return f"{self.case.name} in {self.micro_batch_size}s"


SPLITS = {
    "cpu": (
        Split(Case("w192-d6 image 128 b256", 192, 6, 3, 128, 32, 1024, 256, ("fp32",)), 32),
        Split(Case("w128-d3 image 64 b2048", 128, 3, 2, 64, 16, 1024, 2048, ("fp32",)), 64),
    ),
    "cuda": (
        Split(Case("B/16 image 224 b1024", 768, 12, 12, 224, 64, 32000, 1024, ("bf16",)), 256),
        Split(Case("B/16 image 224 b16384", 768, 12, 12, 224, 64, 32000, 16384, ("bf16",)), 256, CACHED),
    ),
}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    return torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=1e-4)


def our_step(
    split: Split, precision: str, module: nn.Module, optimizer: Optimizer, *, world: World, clip_norm: float
) -> Step:
    """`cached_step`, or `plain_step` where one micro-batch is the whole batch."""
    config = engines.deepspeed_config(
        engines.EngineConfig(),
        world_size=world.world_size,
        precision=precision,
        micro_batch_size=split.case.batch_size,
        clip_norm=clip_norm,
    )
    engine = engines.build_engine(module, optimizer(module.parameters()), config=config, world=world)
    schedule = dict.fromkeys(loop.Schedule._fields) | {"micro_batch_size": split.micro_batch_size}
    parts = {"engine": engine, "world": world, "stop": StopSignal(), "schedule": loop.Schedule(**schedule)}
    run = loop.Trainer(**(dict.fromkeys(loop.Trainer._fields) | parts))
    # on the host, as the loader leaves it
    batch, _ = draw_inputs(split.case, torch.device("cpu"))
    take_step = loop.plain_step if split.micro_batch_size == split.case.batch_size else cached_step
    return partial(take_step, run, batch, 1)


class _Batches(list):
    """What `train_one_epoch` asks of a loader."""

    num_batches = property(len)
    num_samples = property(lambda self: sum(len(texts) for _, texts in self))


def peer_step(
    split: Split, precision: str, module: nn.Module, optimizer: Optimizer, *, world: World, clip_norm: float
) -> Step:
    """An epoch of one optimizer step in open_clip's own loop."""
    batch, pixels = draw_inputs(split.case, torch.device("cpu"))
    size = split.micro_batch_size
    batches = _Batches(zip(pixels.split(size), batch.part("texts").split(size), strict=True))
    arguments = SimpleNamespace(
        device=str(world.device), precision={"fp32": "fp32", "bf16": "amp_bf16"}[precision],
        accum_freq=len(batches), batch_size=size, grad_clip_norm=clip_norm or None, distill=False,
        skip_scheduler=True, horovod=False, wandb=False, log_every_n_steps=1, rank=0, local_rank=0, world_size=1,
    )  # fmt: skip
    data = {"train": SimpleNamespace(set_epoch=lambda _: None, dataloader=batches)}
    inner = module.model
    updates = with_moments(optimizer(inner.parameters()))
    return partial(train_one_epoch, inner, data, SigLipLoss(), 0, updates, None, None, None, arguments)


def with_moments(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Create the optimizer's state now, as this project's engine does, and not in the first step that is measured."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return optimizer


def build(
    split: Split,
    precision: str,
    name: str,
    world: World,
    *,
    optimizer: Optimizer = adamw,
    clip_norm: float = CLIP_NORM,
) -> tuple[nn.Module, Step]:
    """The model of a contestant and its step."""
    if name.endswith("whole"):
        split = replace(split, micro_batch_size=split.case.batch_size)
    side = name.split()[0]
    # the weights alone are wanted, and a batch of one pair is drawn faster
    module, _ = build_losses(replace(split.case, batch_size=1), world.device)[side]
    make = our_step if side == "ours" else peer_step
    return module, make(split, precision, module, optimizer, world=world, clip_norm=clip_norm)


def update(split: Split, name: str, world: World) -> dict[str, Tensor]:
    """What one step of plain gradient descent takes from each parameter: its gradient."""
    module, step = build(
        split, "fp32", name, world, optimizer=partial(torch.optim.SGD, lr=1.0), clip_norm=0.0
    )
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    step()
    return {key: before[key] - value.detach() for key, value in module.named_parameters()}


def check_updates(split: Split, world: World) -> str:
    """How far the gradients of both forms are from those of the whole batch. Raises if ours are."""
    split = replace(split, case=replace(split.case, batch_size=4 * split.micro_batch_size))
    errors, ratios = {}, {}
    for name in CACHED:
        found = update(split, name, world)
        expected = update(split, name.split()[0] + " whole", world)
        scalars = [key for key in found if key.endswith(("logit_scale", "logit_bias"))]
        towers = [key for key in found if key not in scalars]
        gaps = torch.stack([(found[key] - expected[key]).norm() for key in towers]).norm()
        errors[name] = (gaps / torch.stack([expected[key].norm() for key in towers]).norm()).item()
        ratios[name] = [(found[key] / expected[key]).item() for key in scalars]
    ours, peer = CACHED
    assert errors[ours] < 1e-4, errors
    assert all(math.isclose(ratio, 1, rel_tol=1e-4) for ratio in ratios[ours]), ratios
    return (
        f"{split.name}, but 4 micro-batches, {split.case.batch_size} pairs, fp32, against the whole batch: gradients "
        f"of the towers off by {errors[ours]:.0e} (ours), {errors[peer]:.0e} (open_clip); gradients of scale and bias "
        f"{' and '.join(f'{ratio:.4f}' for ratio in ratios[ours])} times as large (ours), "
        f"{' and '.join(f'{ratio:.4f}' for ratio in ratios[peer])} times (open_clip)"
    )


def peak_memory(index: int, precision: str, name: str, world: World) -> float:
    """Peak MB of a step beside model, optimizer state, batch and libraries."""
    if world.device.type == "cpu":
        return float(run_child([__file__, "--probe", str(index), precision, name]).split()[-1])
    _, step = build(SPLITS["cuda"][index], precision, name, world)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def probe(index: int, precision: str, name: str, world: World) -> float:
    """The same in this process on a CPU."""
    _, step = build(SPLITS["cpu"][index], precision, name, world)
    reset_peak_resident_memory()
    before = peak_resident_memory()
    step()
    return peak_resident_memory() - before


def compare(index: int, precision: str, world: World, rounds: int) -> list[Row]:
    """All contestants of one split and precision, interleaved."""
    split = SPLITS[world.device.type][index]
    memory = {name: peak_memory(index, precision, name, world) for name in split.contestants}
    steps = {name: build(split, precision, name, world)[1] for name in split.contestants}
    timers = {name: partial(timed, step, world.device) for name, step in steps.items()}
    # the allocators of all threads have their memory by then: the first steps take up to half as long again
    measurements = measure(timers, rounds=rounds, warmup=3)
    return rows("gradient_cache", f"{split.name} {precision}", "ms/step", measurements, memory)


def main() -> None:
    """Compare at the sizes that suit the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", type=int, help="indices; default all")
    parser.add_argument("--save", action="store_true", help="keep rows and report in results/")
    parser.add_argument("--probe", nargs=3, metavar=("CASE", "PRECISION", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    world = init_world("auto")
    if arguments.probe:
        index, precision, name = arguments.probe
        print(probe(int(index), precision, name, world))
        return
    splits = SPLITS[world.device.type]
    chosen = arguments.cases if arguments.cases is not None else range(len(splits))
    notes = [check_updates(splits[0], world)]
    notes.append("memory is the peak of a step beside model, optimizer state, batch and libraries")
    notes.append(f"open_clip {open_clip.__version__}, its own train_one_epoch; ours under DeepSpeed, ZeRO 1")
    table = [
        row
        for index in chosen
        for precision in splits[index].case.precisions
        for row in compare(index, precision, world, arguments.rounds)
    ]
    finish(table, BASELINES, notes, save=arguments.save)


if __name__ == "__main__":
    main()
