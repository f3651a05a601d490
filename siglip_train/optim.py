"""AdamW over rule-made parameter groups, and the learning rate as a pure function of samples seen."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from siglip_train.errors import UserError


@dataclass
class ParameterRule:
    """What happens to the parameters whose name `pattern` finds (re.search); the first rule that matches decides.

    pattern: regular expression. decay: whether weight decay applies. lr_multiplier: factor of the learning rate.
    frozen: no gradient and no optimizer state; nothing is computed backward below the lowest parameter that trains.
    """

    pattern: str
    decay: bool = True
    lr_multiplier: float = 1.0
    frozen: bool = False

    def __post_init__(self) -> None:
        """Refuse a pattern that is no regular expression."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None


# big_vision decays only what flax calls a kernel: the matrices of linear layers (recipe §1.3)
DEFAULT_RULES = (
    ParameterRule(
        r"\.bias$|norm|position|token_embedding|probe|cls_token|mask_token|prototypes|logit_scale|logit_bias",
        decay=False,
    ),
    ParameterRule(r"\.weight$"),
)


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    lr: learning rate after the warm-up. weight_decay: of linear weights, as torch's AdamW means it: a step takes
    lr * weight_decay * weight away. The papers' 1e-4 at lr 1e-3 is big_vision's decoupled form and equals 0.1 here.
    betas: of the running means of gradients and of their squares. eps: added to the root of the latter.
    warmup_samples: pairs over which the learning rate rises from 0; null = warmup_share of the schedule's. schedule:
    how it then falls to 0 at the end; constant = not at all. schedule_samples: pairs at which that end is, null =
    total_samples; a stage of a recipe ends before it. warmup_share: of the pairs of the schedule, where warmup_samples
    is null; a shorter run then warms up less. clip_norm: longest gradient, over all parameters; longer ones are
    shortened to it.
    rules: come before the built-in ones, which decay linear weights only; a parameter that none covers is an error.
    layer_decay: of the learning rate, for each layer down from the top of either tower: the head and the last norm keep
    it, the last block has it once, the first block `depth` times, embeddings once more. decay_pretrained: whether
    weights that `init_from` gave are decayed; False keeps a pretrained tower what it is (SigLIP, section 4.5).
    lr_by_width: rates by the width of the image tower, of which the widest that fits is taken where lr is null.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_samples: int | None = None
    warmup_share: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    schedule_samples: int | None = None
    clip_norm: float = 1.0
    layer_decay: float | None = None
    decay_pretrained: bool = True
    rules: list[ParameterRule] = field(default_factory=list)
    lr_by_width: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, or null, got {self.layer_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in 0..1, got {list(self.betas)}")
        if self.schedule_samples is not None and self.schedule_samples < 1:
            raise ValueError(f"schedule_samples must be at least 1, or null, got {self.schedule_samples}")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share must be at least 0 and below 1, got {self.warmup_share}")
        if (self.warmup_samples or 0) < 0 or self.weight_decay < 0 or self.clip_norm <= 0:
            raise ValueError(
                "warmup_samples and weight_decay must not be negative, clip_norm must be above 0"
            )
        if not all(width.isdigit() and rate > 0 for width, rate in self.lr_by_width.items()):
            raise ValueError(f"lr_by_width maps widths to rates above 0, got {self.lr_by_width}")

    def lr_for(self, width: int) -> float:
        """The rate in `lr_by_width` for the largest width up to `width`, or for the smallest width in the table."""
        table = sorted((int(key), rate) for key, rate in self.lr_by_width.items())
        return max((entry for entry in table if entry[0] <= width), default=table[0])[1]

    def length(self, total_samples: int) -> int:
        """Number of samples in the whole schedule of a run that ends at `total_samples`."""
        return self.schedule_samples or total_samples

    def warmup(self, total_samples: int) -> int:
        """Number of samples in the warm-up of a run that ends at `total_samples`."""
        if self.warmup_samples is not None:
            return self.warmup_samples
        return round(self.warmup_share * self.length(total_samples))


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
_EMBEDDING = re.compile(r"^(.*\.)?(?:patch_embedding|token_embedding|position_table|cls_token)\b")


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
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups(model, config, pretrained, steps)`."""
    groups = parameter_groups(model, config, pretrained, steps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


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


def schedule(config: OptimConfig, *, samples_seen: int, batch: int, total_samples: int) -> float:
    """The factor on every learning rate for the step that takes `samples_seen` to `samples_seen + batch`.

    Linear warm-up counts the samples of the step itself, so that the first step moves; the decay starts after it and
    ends at 0 (big_vision's cosine, recipe §1.3), at `schedule_samples` where the run ends before. It depends on nothing
    but the samples seen since the recipe began, so that the stages of a recipe share one curve.
    """
    warmup_samples = config.warmup(total_samples)
    warmup = min(1.0, (samples_seen + batch) / warmup_samples) if warmup_samples else 1.0
    span = max(1, config.length(total_samples) - warmup_samples)
    progress = min(1.0, max(0.0, (samples_seen - warmup_samples) / span))
    decay = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.schedule]
    return warmup * decay


def lr_for_batch(lr: float, batch: int, reference_batch: int) -> float:
    """The rate for batches of `batch` where `lr` is that for `reference_batch`, by the square-root rule.

    Adam divides a gradient by its size, so noise that falls with the root of the batch lets the rate grow with it; the
    linear rule is that of SGD (Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms").
    """
    return lr * math.sqrt(batch / reference_batch)
