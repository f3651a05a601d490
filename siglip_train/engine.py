"""Turns `EngineConfig` into DeepSpeed's own engine, and takes its gradients through a step.

This file and `engine_state.py` alone import deepspeed. Precision is DeepSpeed's torch_autocast over fp32 parameters:
`bf16.enabled` would cast frozen teachers too.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siglip_train.data.remote.locations import cache_folder
from siglip_train.distributed.setup import World
from siglip_train.engine_state import create_moments
from siglip_train.models.decoder import Decoder
from siglip_train.models.layers import Encoder


@dataclass
class EngineConfig:
    """How the model is sharded and sped up.

    zero_stage: 0 = plain data parallelism, 1 = optimizer state, 2 = + gradients, 3 = + parameters sharded over ranks;
    auto = 0 for a rank that is alone, which would keep a second copy of its weights for nothing, else 1.
    activation_checkpointing: compute each block once more in the backward pass, to keep its input alone: less memory, a
    third more work. compile_blocks: torch.compile on each transformer block; off, as the first step then waits for a
    compiler, and what it gains has not been measured on a GPU yet (`benchmarks/validate_gpu.py` measures it).
    reduce_dtype: what gradients (and ZeRO-3 parameters) travel in under bf16; fp32 is exact, bf16 halves the traffic.
    """

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    activation_checkpointing: bool = False
    compile_blocks: bool = False
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"

    def stage(self, world_size: int) -> int:
        """The ZeRO stage of a run of so many ranks."""
        return int(world_size > 1) if self.zero_stage == "auto" else self.zero_stage


# elements that are reduced or gathered at once: 0.4 GB in fp32, where DeepSpeed's own choice is 2 GB, and twice that
# with overlap
_BUCKET = 100_000_000


def deepspeed_config(
    config: EngineConfig,
    *,
    world_size: int,
    precision: Literal["bf16", "fp32"],
    micro_batch_size: int,
    clip_norm: float,
    has_teacher: bool = False,
) -> dict[str, Any]:
    """The dict that DeepSpeed takes; nothing is written to disk.

    has_teacher: parameters are copied in place where they are sharded (`models.ema`).
    """
    autocast: dict[str, Any] = {"enabled": precision == "bf16", "dtype": "bfloat16"}
    if config.reduce_dtype == "fp32":
        autocast["lower_precision_safe_modules"] = []
    zero: dict[str, Any] = {
        "stage": config.stage(world_size),
        # reductions run beside the backward pass; DeepSpeed's default does so at stage 3 alone
        "overlap_comm": True,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    if has_teacher:
        # it keeps small parameters whole, and would not see in them what is copied into their parts
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": autocast,
        "steps_per_print": 10**12,
    }


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, config: dict[str, Any], world: World
) -> Any:
    """DeepSpeed's engine around `model`. All ranks."""
    # read by deepspeed at import: without it a machine with a GPU would not train on its CPU
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # an all-reduce for CPU ranks that DeepSpeed would compile here, which needs a compiler on the user's machine
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model.to(world.device), optimizer=optimizer, config=config, dist_init_required=False
    )
    create_moments(engine)
    _let_it_wait_once(engine)
    return engine


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """The number of values in all parameters and in those that train, also where ZeRO-3 has sharded them."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def apply_speed_options(model: nn.Module, config: EngineConfig) -> None:
    """Switch on activation checkpointing and compile the blocks, from outside the model."""
    if config.compile_blocks:
        # torch's own choice is a folder in the shared temporary one whose name all can guess, and it runs what is there
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder(None) / "inductor"))
    for module in model.modules():
        if isinstance(module, (Encoder, Decoder)):
            module.activation_checkpointing = config.activation_checkpointing
            if config.compile_blocks:
                for block in module.blocks:
                    block.compile()


@contextmanager
def one_reduction(engine: Any) -> Iterator[None]:
    """Reduce the gradients of every `engine.backward` in the block once, at its end. All ranks.

    Until then each rank holds whole gradients of its own, at ZeRO 2 and 3 too, whose hooks would otherwise reduce and
    shard in every backward: one reduction a step is paid for with the memory that those stages save on gradients.
    """
    is_plain = engine.zero_optimization_stage() == 0
    with engine.no_sync() if is_plain else engine.coalesce_grad_reduction():
        try:
            yield
        except BaseException:
            # DeepSpeed reduces on the way out even so (0.19.8), and would wait for ranks that have not failed
            engine.module.zero_grad(set_to_none=True)
            raise
    if is_plain:
        engine.allreduce_gradients()


class Update(NamedTuple):
    """What became of a step. norm: of the gradients before clipping, a scalar on the device."""

    norm: Tensor
    is_applied: bool


def take_step(engine: Any) -> Update:
    """Clip the gradients and update the weights, unless the gradients' norm is not finite. All ranks.

    The host waits for the norm, and for nothing else.
    """
    if engine.zero_optimization_stage() == 0:
        return _step_without_zero(engine)
    engine.step()
    return Update(torch.as_tensor(engine.get_global_grad_norm()), engine.was_step_applied())


def _step_without_zero(engine: Any) -> Update:
    weights = [weight for weight in engine.module.parameters() if weight.grad is not None]
    norm = torch.stack(torch._foreach_norm([weight.grad for weight in weights])).square().sum().sqrt()
    torch.nn.utils.clip_grads_with_norm_(weights, engine.gradient_clipping(), norm)
    is_finite = bool(norm.isfinite())
    if is_finite:
        engine.step()
    else:
        engine.module.zero_grad(set_to_none=True)
    return Update(norm, is_finite)


def _let_it_wait_once(engine: Any) -> None:
    """Let the host wait once for the norm of the gradients, which without ZeRO `take_step` clips.

    NOTE: DeepSpeed (0.19.8) waits at the norm of every group of parameters, and at stages 1 and 2 once more at the
    clipping of each. Here it does so where it asks whether the whole norm is finite.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        engine.clip_fp32_gradients = lambda: None
    elif stage in (1, 2):
        optimizer.scaled_global_norm = partial(
            _norm_over_ranks, optimizer, len(optimizer.bit16_groups), torch.float32
        )
        optimizer.unscale_and_clip_grads = partial(_clip, optimizer.clip_grad)
    else:
        groups = len(optimizer.fp16_groups)
        optimizer._get_norm_groups = lambda: [_norm_over_ranks(optimizer, groups, torch.float64)]


def _norm_over_ranks(optimizer: Any, groups: int, dtype: torch.dtype) -> Tensor:
    """The norm of the gradients, of which each rank holds parts in `averaged_gradients`, by group. All ranks.

    In float64 as in DeepSpeed. dtype: of what ranks add up.
    """
    parts = [optimizer.averaged_gradients.get(group) for group in range(groups)]
    # a rank may have no part in a group
    squares = torch.stack([_square(each, optimizer.device) for each in parts]).to(dtype)
    dist.all_reduce(squares)
    return torch.linalg.vector_norm(squares.sqrt())


def _square(gradients: Sequence[Tensor] | None, device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in gradients]
    return torch.stack(norms).square().sum()


def _clip(clip_norm: float, gradients: Iterable[Tensor], norm: Tensor) -> None:
    factor = 1 / ((norm + 1e-6) / clip_norm).clamp(min=1)
    for gradient in gradients:
        gradient.mul_(factor)
