"""Reads and sets the weights and the optimizer state of DeepSpeed's engine by parameter name, sharded or not."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


# beside them: how many updates the parameter has had, which AdamW corrects its moments by
STEP = "step"


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


def create_moments(engine: Any) -> None:
    """Give every tensor its zero moments now.

    NOTE: DeepSpeed links parameters to their moments after the first group's step, when the other groups have none yet
    (0.19.8), and then finds none for them; moments that exist before the first step avoid that, and can be restored.
    """
    optimizer = inner_optimizer(engine)
    for tensor, _ in _optimizer_tensors(engine):
        # a fused AdamW counts on its device; the others would wait for it there
        device = tensor.device if optimizer.defaults.get("fused") else "cpu"
        optimizer.state[tensor] = {
            STEP: torch.zeros((), dtype=torch.float32, device=device),
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
