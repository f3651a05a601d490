"""AdamW over groups of parameters that rules make, and a watch over parameters that nothing trains."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from siglip_train.errors import UserError
from siglip_train.optim import OptimConfig, ParameterRule

# big_vision decays only what flax calls a kernel: the matrices of linear layers (recipe §1.3)
DEFAULT_RULES = (
    ParameterRule(
        r"\.bias$|norm|position|(token|mask)_embedding|probe|cls_token|mask_token|prototypes|logit_scale|logit_bias",
        decay=False,
    ),
    ParameterRule(r"\.weight$"),
)


def parameter_groups(
    model: nn.Module,
    config: OptimConfig,
    pretrained: Collection[str] = (),
    steps: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Sort the parameters into AdamW groups by the rules; frozen ones lose `requires_grad` and are in no group.

    pretrained: names of parameters that were loaded. steps: how many updates each parameter has had, 0 where it is not
    named; a group holds parameters of one count, as ZeRO keeps one for a group and the bias correction of moments
    depends on it (with beta2 0.999, a new parameter in an old group would move 6 times too far). A parameter without
    `requires_grad` is frozen whatever the rules say. Each group carries `lr_multiplier` and the `names` of its
    parameters. Raises `UserError` for a parameter that no rule covers, and for a rule of the user's that covers none.
    """
    rules, steps = [*config.rules, *DEFAULT_RULES], steps or {}
    depths = _depths(model)
    groups: dict[tuple[bool, float, int], dict[str, Any]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        index = next((i for i, rule in enumerate(rules) if re.search(rule.pattern, name)), None)
        if index is None:
            raise UserError(f"optim.rules: no rule covers the parameter {name}; add one with its pattern")
        used.add(index)
        rule = rules[index]
        if rule.frozen or not parameter.requires_grad:
            parameter.requires_grad = False
            continue
        is_decayed = rule.decay and (config.decay_pretrained or name not in pretrained)
        lr_multiplier = rule.lr_multiplier * (config.layer_decay or 1.0) ** _layers_above(name, depths)
        group = groups.setdefault(
            (is_decayed, lr_multiplier, steps.get(name, 0)),
            {
                "params": [],
                "names": [],
                "lr_multiplier": lr_multiplier,
                "weight_decay": config.weight_decay if is_decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    for index, rule in enumerate(config.rules):
        if index not in used:
            raise UserError(f"optim.rules[{index}]: the pattern {rule.pattern!r} covers no parameter")
    if not groups:
        raise UserError("optim.rules: every parameter is frozen, nothing is left to train")
    return list(groups.values())


_BLOCK = re.compile(r"^(.*\.)?encoder\.blocks\.(\d+)\.")


_EMBEDDING = re.compile(
    r"^(.*\.)?(?:patch_embedding|token_embedding|token_projection|position_table|cls_token)\b"
)


def _depths(model: nn.Module) -> dict[str | None, int]:
    """The number of blocks of each tower, by what stands before `encoder` in the names of its parameters."""
    depths: dict[str | None, int] = {}
    for name, _ in model.named_parameters():
        if found := _BLOCK.match(name):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    return depths


def _layers_above(name: str, depths: dict[str | None, int]) -> int:
    """How far below the top of its tower a parameter stands: 0 = above all blocks, or in no tower."""
    if found := _BLOCK.match(name):
        return depths[found[1]] - int(found[2])
    found = _EMBEDDING.match(name)
    return depths[found[1]] + 1 if found and found[1] in depths else 0


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    pretrained: Collection[str] = (),
    steps: Mapping[str, int] | None = None,
    *,
    fused: bool = False,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups(model, config, pretrained, steps)`.

    fused: one kernel for all of a step, which reads and writes 28 bytes a parameter where the default on a GPU moves
    80; its state is the same.
    """
    groups = parameter_groups(model, config, pretrained, steps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


class UnusedParameters:
    """Watches a model through its first step for parameters that train but get no gradient.

    Such parameters would be moved by weight decay alone, at ZeRO 1 to 3, where each has a gradient of zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        self._waiting = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._hooks = [
            parameter.register_hook(lambda _, name=name: self._waiting.discard(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def stop(self) -> list[str]:
        """Stop watching; return the names of parameters that got no gradient."""
        for hook in self._hooks:
            hook.remove()
        return sorted(self._waiting)
