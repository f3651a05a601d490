"""The options of AdamW, and the learning rate as a pure function of the samples seen."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal


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
