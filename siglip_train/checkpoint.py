"""Checkpoints of a run: complete or absent, safetensors and JSON only, loadable at any ZeRO stage and number of ranks.

`checkpoints/step-NNNNNNNN/` holds `weights/` (an export folder that `load_model` opens), `heads.safetensors` (what
objectives own, and layers with adapters, which are merged in `weights/` and go on from here), `moments.safetensors`
(AdamW's, by parameter name) and `state.json`; `checkpoints/LAST` names the newest.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siglip_train import engine as engines
from siglip_train.distributed.collectives import broadcast_object
from siglip_train.errors import UserError
from siglip_train.models.adapters import is_unmerged, merged_name

MODEL_PREFIX = "model."


@dataclass
class CheckpointConfig:
    """When to save and how many to keep; a checkpoint is always written at the end and on a stop signal.

    every_steps: optimizer steps from one to the next, 0 = not by steps. every_minutes: the same by the clock, 0 = not.
    keep: the newest so many stay.
    """

    every_steps: int = 1000
    every_minutes: float = 0.0
    keep: int = 2

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.every_steps < 0 or self.every_minutes < 0 or self.keep < 1:
            raise ValueError(
                "every_steps and every_minutes must not be negative (0 = off), keep must be at least 1"
            )


class Progress(NamedTuple):
    """How far a run is: optimizer steps done, pairs seen, and the loader's state.

    pretrained: the parameters that `init_from` gave when the run began, which may be treated in another way.
    """

    step: int = 0
    samples_seen: int = 0
    loader: dict[str, Any] | None = None
    pretrained: Sequence[str] = ()


class Checkpoints:
    """Saves the checkpoints of one run, on time.

    write_weights: writes the export folder of the model from its state dict; called on rank 0 only.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        write_weights: Callable[[Path, dict[str, Tensor]], None],
    ) -> None:
        self._folder = run_dir / "checkpoints"
        self._config = config
        self._write_weights = write_weights
        self._last_time = time.monotonic()
        self.last_step: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due at this step by count or by time. The clock is rank 0's. All ranks."""
        config = self._config
        if config.every_steps and step % config.every_steps == 0:
            return True
        if not config.every_minutes:
            return False
        return broadcast_object(time.monotonic() - self._last_time > 60 * config.every_minutes)

    def save(self, engine: Any, progress: Progress) -> None:
        """Write the checkpoint aside, then rename it; delete the oldest beyond `keep`. All ranks.

        Raises `UserError` on every rank when rank 0 cannot write (a full disk).
        """
        if self.last_step == progress.step:
            return
        weights = engines.gather_weights(engine)
        moments = engines.gather_moments(engine)
        failure = None
        if engine.global_rank == 0:
            try:
                self._write(weights, moments, progress)
            except (OSError, SafetensorError) as error:
                failure = f"cannot write a checkpoint to {self._folder}: {error}; earlier ones are untouched"
        failure = broadcast_object(failure)
        if failure is not None:
            raise UserError(failure)
        self.last_step = progress.step
        self._last_time = time.monotonic()

    def _write(self, weights: dict[str, Tensor], moments: dict[str, Tensor], progress: Progress) -> None:
        final = self._folder / f"step-{progress.step:08d}"
        partial = self._folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model = {k.removeprefix(MODEL_PREFIX): v for k, v in weights.items() if k.startswith(MODEL_PREFIX)}
        heads = {k: v for k, v in weights.items() if not k.startswith(MODEL_PREFIX) or is_unmerged(k)}
        self._write_weights(partial / "weights", model)
        save_file(heads, partial / "heads.safetensors")
        save_file(moments, partial / "moments.safetensors")
        (partial / "state.json").write_text(json.dumps(progress._asdict(), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        pointer = self._folder / ".LAST.partial"
        pointer.write_text(final.name + "\n")
        os.replace(pointer, self._folder / "LAST")
        for old in sorted(self._folder.glob("step-*"))[: -self._config.keep]:
            shutil.rmtree(old)


def find(path: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to resume from: `auto` = the newest of run_dir if any, a path = that run's newest or that one."""
    if path is None:
        return None
    root = run_dir if path == "auto" else Path(path)
    if (root / "state.json").exists():
        return root
    pointer = root / "checkpoints" / "LAST"
    if pointer.exists():
        found = pointer.parent / pointer.read_text().strip()
        if not (found / "state.json").exists():
            raise UserError(f"{pointer} names {found.name}, which is not there or not complete")
        return found
    if path == "auto":
        return None
    raise UserError(f"resume: {path} is neither a checkpoint nor a run with one")


class Saved(NamedTuple):
    """A checkpoint in memory."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    progress: Progress


def read(folder: Path) -> Saved:
    """Read a checkpoint. Raises `UserError` when a file is missing or damaged."""
    try:
        state = json.loads((folder / "state.json").read_text())
        progress = Progress(**{**state, "pretrained": tuple(state.get("pretrained", ()))})
        model = load_file(folder / "weights" / "model.safetensors")
        weights = {MODEL_PREFIX + name: tensor for name, tensor in model.items()}
        heads = load_file(folder / "heads.safetensors")
        for name in filter(is_unmerged, heads):
            weights.pop(merged_name(name), None)
        weights.update(heads)
        moments = load_file(folder / "moments.safetensors")
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from None
    return Saved(weights, moments, progress)


def restore_weights(model: nn.Module, saved: Saved, folder: Path) -> None:
    """Load the weights into the training model, before the engine is built around it."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.weights.items()}
    differing = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if differing:
        name = differing[0]
        raise UserError(
            f"the checkpoint {folder} does not fit the config: {name} is {found.get(name)} there and "
            f"{expected.get(name)} here ({len(differing)} differ); use its own config, or init_from for a new run"
        )
    with torch.no_grad():
        model.load_state_dict(saved.weights)


def restore_optimizer(engine: Any, saved: Saved) -> None:
    """Load AdamW's moments and step count into the engine. All ranks."""
    missing = [
        name
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad and f"{name}.{engines.MOMENTS[0]}" not in saved.moments
    ]
    if missing:
        raise UserError(
            f"the checkpoint has no optimizer state for {missing[0]} ({len(missing)} such): it was frozen in that run; "
            "start a new run with init_from instead"
        )
    engines.restore_moments(engine, saved.moments, saved.progress.step)
