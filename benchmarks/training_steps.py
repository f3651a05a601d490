"""The trainer's own step, as validate_gpu.py runs it: the ways to shard it and to speed it up."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_step import CUDA_CASES, Case, draw_inputs

from siglip_train import engine as engines
from siglip_train import loop
from siglip_train.distributed.setup import World
from siglip_train.gradient_cache import cached_step
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.optim import OptimConfig
from siglip_train.parameter_groups import build_optimizer
from siglip_train.supervision.stop_signal import StopSignal


class Variant(NamedTuple):
    """What differs from the default. micro_batches: of the gradient cache."""

    engine: dict[str, Any]
    micro_batches: int = 1


VARIANTS = {
    "default": Variant({}),
    "ZeRO 1": Variant({"zero_stage": 1}),
    "ZeRO 2": Variant({"zero_stage": 2}),
    "ZeRO 3": Variant({"zero_stage": 3}),
    "checkpointing": Variant({"activation_checkpointing": True}),
    "gradient cache": Variant({}, micro_batches=4),
    "compiled": Variant({"compile_blocks": True}),
}
_SMALL = Case("w32-d1 image 32 b8", 32, 1, 2, 32, 8, 64, 8, ("bf16",))


def config_of(device: torch.device) -> tuple[SiglipConfig, int]:
    """Sizes, and pairs of a step: B/16 at 256 on a GPU, a tiny model on a CPU."""
    case = _case(device)
    return case.config(), case.batch_size


def our_step(name: str, config: SiglipConfig, pairs: int, world: World) -> tuple[Any, Callable[[], object]]:
    """The engine of a variant, and a step of it on a fixed batch."""
    variant, optim = VARIANTS[name], OptimConfig()
    options = engines.EngineConfig(**variant.engine)
    model = TrainingModel(Siglip(config), {"sigmoid": SigmoidLoss()})
    engines.apply_speed_options(model, options)
    settings = engines.deepspeed_config(
        options,
        world_size=world.world_size,
        precision="bf16",
        micro_batch_size=pairs,
        clip_norm=optim.clip_norm,
    )
    optimizer = build_optimizer(model, optim, fused=world.device.type == "cuda")
    engine = engines.build_engine(model, optimizer, config=settings, world=world)
    micro_batch_size = pairs // variant.micro_batches
    schedule = dict.fromkeys(loop.Schedule._fields) | {"micro_batch_size": micro_batch_size}
    parts = {"engine": engine, "world": world, "stop": StopSignal(), "schedule": loop.Schedule(**schedule)}
    run = loop.Trainer(**(dict.fromkeys(loop.Trainer._fields) | parts))
    batch, _ = draw_inputs(_case(world.device), torch.device("cpu"))
    take_step = loop.plain_step if micro_batch_size == pairs else cached_step
    return engine, partial(take_step, run, batch, 1)


def _case(device: torch.device) -> Case:
    return CUDA_CASES[0] if device.type == "cuda" else _SMALL
