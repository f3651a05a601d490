"""Turns `EngineConfig` into DeepSpeed's own engine, and reads and sets the optimizer state by parameter name.

The only file that imports deepspeed. Precision is DeepSpeed's torch_autocast over fp32 parameters: `bf16.enabled` would
cast frozen teachers too.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from siglip_train.data.remote.locations import cache_folder
from siglip_train.distributed.setup import World
from siglip_train.models.layers import Encoder

MOMENTS = ("exp_avg", "exp_avg_sq")
# beside them: how many updates the parameter has had, which AdamW corrects its moments by
STEP = "step"


@dataclass
class EngineConfig:
    """How the model is sharded and sped up.

    zero_stage: 0 = plain data parallelism, 1 = optimizer state, 2 = + gradients, 3 = + parameters sharded over ranks.
    activation_checkpointing: compute each block once more in the backward pass, to keep its input alone: less memory, a
    third more work. compile_blocks: torch.compile on each transformer block.
    reduce_dtype: what gradients (and ZeRO-3 parameters) travel in under bf16; fp32 is exact, bf16 halves the traffic.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    activation_checkpointing: bool = False
    compile_blocks: bool = False
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"


def deepspeed_config(
    config: EngineConfig,
    *,
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
    zero: dict[str, Any] = {"stage": config.zero_stage}
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
    _create_moments(engine)
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
        if isinstance(module, Encoder):
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


def gradient_norm(engine: Any) -> float:
    """The norm of the gradients before clipping, after `engine.step()`."""
    return float(engine.get_global_grad_norm() or 0.0)


def unclipped_norm_without_zero(engine: Any) -> Tensor:
    """The norm before clipping at stage 0, where DeepSpeed does not report it. Call it before `engine.step()`."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _optimizer_tensors(engine: Any) -> list[tuple[Tensor, list[str]]]:
    """The tensors that AdamW keeps a state for, each with the names of the parameters that share its step count.

    They are parameters (stage 0) or this rank's flat partitions of groups, which stage 3 cuts into sub-groups.
    """
    stage, groups = engine.zero_optimization_stage(), inner_optimizer(engine).param_groups
    if stage == 0:
        return [
            (parameter, [name])
            for group in groups
            for parameter, name in zip(group["params"], group["names"], strict=True)
        ]
    if stage == 3:
        flat, group_of = engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.sub_group_to_group_id
        return [(tensor, groups[group_of[index]]["names"]) for index, tensor in enumerate(flat)]
    flat = engine.optimizer.single_partition_of_fp32_groups
    return [(tensor, group["names"]) for tensor, group in zip(flat, groups, strict=True)]


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _create_moments(engine: Any) -> None:
    """Give every tensor its zero moments now.

    NOTE: DeepSpeed links parameters to their moments after the first group's step, when the other groups have none yet
    (0.19.8), and then finds none for them; moments that exist before the first step avoid that, and can be restored.
    """
    state = inner_optimizer(engine).state
    for tensor, _ in _optimizer_tensors(engine):
        state[tensor] = {
            STEP: torch.zeros((), dtype=torch.float32),
            **{key: torch.zeros_like(tensor, dtype=torch.float32) for key in MOMENTS},
        }
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _full(engine: Any, parameter: Tensor, key: str | None) -> Tensor:
    """The whole of a parameter (key None) or one of its moments, fp32. All ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return parameter if key is None else engine.optimizer.state[parameter][key]
    if key is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


def scalar(engine: Any, parameter: Tensor) -> float:
    """The value of a one-element parameter, also where ZeRO-3 has sharded it. All ranks."""
    full = _full(engine, parameter, None) if parameter.requires_grad else _frozen(parameter)
    return full.item()


def gather_weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter and buffer in full, fp32 on the CPU, on rank 0; empty on the others. All ranks."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = _frozen(parameter) if not parameter.requires_grad else _full(engine, parameter, None)
        if engine.global_rank == 0:
            weights[name] = full.detach().float().cpu().clone()
    if engine.global_rank == 0:
        weights.update(
            {name: buffer.detach().cpu().clone() for name, buffer in engine.module.named_buffers()}
        )
    return weights


def _gathered(parameters: Iterable[Tensor]) -> AbstractContextManager:
    """A context in which the parameters are whole on every rank, sharded or not. All ranks."""
    import deepspeed

    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()


def _frozen(parameter: Tensor) -> Tensor:
    """A frozen parameter has no fp32 copy in the optimizer; under ZeRO-3 it is gathered from the shards. All ranks."""
    with _gathered([parameter]):
        return parameter.detach().clone()


def gather_moments(engine: Any) -> dict[str, Tensor]:
    """AdamW's state by parameter name (`NAME.exp_avg`, `NAME.step`, …), in full, on rank 0 only. All ranks.

    By name and in full it fits any ZeRO stage, any number of ranks and a model with added heads.
    """
    moments = {}
    state = inner_optimizer(engine).state
    for tensor, names in _optimizer_tensors(engine) if engine.global_rank == 0 else ():
        steps = int(state[tensor][STEP])
        moments.update({f"{name}.{STEP}": torch.tensor(steps) for name in names})
    for name, parameter in engine.module.named_parameters():
        for key in MOMENTS if parameter.requires_grad else ():
            full = _full(engine, parameter, key)
            if engine.global_rank == 0:
                moments[f"{name}.{key}"] = full.detach().float().cpu().clone()
    return moments


def restore_moments(engine: Any, moments: Mapping[str, Tensor]) -> None:
    """Set AdamW's moments and step counts from what `gather_moments` gave. All ranks, each with all moments.

    A parameter that `moments` lacks starts at step 0 with moments of zero. The parameters of a group must have
    one step count (`optim.parameter_groups` sees to that), as stages 1 to 3 keep no other.
    """
    for name, parameter in engine.module.named_parameters():
        for key in MOMENTS if parameter.requires_grad and f"{name}.{STEP}" in moments else ():
            _set_moment(engine, parameter, key, moments[f"{name}.{key}"])
    steps, state = steps_of(moments), inner_optimizer(engine).state
    for tensor, names in _optimizer_tensors(engine):
        (count,) = {steps.get(name, 0) for name in names}
        state[tensor][STEP].fill_(count)


def steps_of(moments: Mapping[str, Tensor]) -> dict[str, int]:
    """How many updates each parameter has had whose state `gather_moments` gave."""
    return {
        name.removesuffix(f".{STEP}"): int(count)
        for name, count in moments.items()
        if name.endswith(f".{STEP}")
    }


def _set_moment(engine: Any, parameter: Tensor, key: str, value: Tensor) -> None:
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    stage = engine.zero_optimization_stage()
    if stage == 0:
        engine.optimizer.state[parameter][key].copy_(value)
    elif stage < 3:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
    else:
        # DeepSpeed's own setter does not pad a parameter that the number of ranks does not divide
        size = safe_get_local_optimizer_state(parameter, key).numel()
        padded = torch.zeros(size * engine.world_size)
        padded[: value.numel()] = value.flatten()
        share = padded[engine.global_rank * size : (engine.global_rank + 1) * size]
        safe_set_local_optimizer_state(parameter, share.to(parameter.device), key)
