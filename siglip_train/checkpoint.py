"""Checkpoints of a run: complete or absent, safetensors and JSON only, loadable at any ZeRO stage and number of ranks.

`checkpoints/step-NNNNNNNN/` holds `weights/` (an export folder that `load_model` opens), `heads.safetensors` (what
objectives own, and layers with adapters, which `weights/` has in merged form), `moments.safetensors`
(AdamW's state by parameter name), `state.json`, and `manifest.json` with size and SHA-256 of these files;
`checkpoints/LAST` names the newest. Which one a run resumes from is decided in `resume.py`.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from siglip_train import engine as engines
from siglip_train.distributed.collectives import broadcast_object
from siglip_train.errors import UserError, said
from siglip_train.files import put_folder, write_text
from siglip_train.integrity import MANIFEST, damage, sealing
from siglip_train.interop.files import write_tensors
from siglip_train.interop.runs import LAST, checkpoint_name, checkpoints_in, step_of
from siglip_train.models.adapters import is_unmerged, merged_name

log = logging.getLogger(__name__)

MODEL_PREFIX = "model."
# in state.json: a manifest was written too, so that one without it is known to be damaged
_SEALED = "sealed"


@dataclass
class CheckpointConfig:
    """When to save and how many to keep; a checkpoint is always written at the end and on a stop signal.

    every_steps: optimizer steps from one to the next, 0 = not by steps. every_minutes: the same by the clock, 0 = not.
    keep: the newest so many stay. keep_every_steps: those at multiples of it stay too, 0 = none do.
    """

    every_steps: int = 1000
    every_minutes: float = 0.0
    keep: int = 2
    keep_every_steps: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.every_steps, self.every_minutes, self.keep_every_steps) < 0 or self.keep < 1:
            raise ValueError(
                "every_steps, every_minutes and keep_every_steps must not be negative (0 = off), "
                "keep must be at least 1"
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
        self._not_removed: set[Path] = set()
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
        """Write the checkpoint aside, then rename it; delete what is older than the newest `keep`. All ranks.

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
            except (OSError, SafetensorError, UserError) as error:
                failure = f"cannot write a checkpoint to {self._folder}: {error}; earlier ones are untouched"
        failure = broadcast_object(failure)
        if failure is not None:
            raise UserError(failure)
        self.last_step = progress.step
        self._last_time = time.monotonic()

    def _write(self, weights: dict[str, Tensor], moments: dict[str, Tensor], progress: Progress) -> None:
        final = self._folder / checkpoint_name(progress.step)
        partial = self._folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self._fill(partial, weights, moments, progress)
            self._put(partial, final)
        finally:
            # of a full disk, what was written of this one
            shutil.rmtree(partial, ignore_errors=True)
        write_text(self._folder / LAST, final.name + "\n")
        for old in self._aged(final):
            self._remove(old)

    def _fill(
        self, folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], progress: Progress
    ) -> None:
        model = {k.removeprefix(MODEL_PREFIX): v for k, v in weights.items() if k.startswith(MODEL_PREFIX)}
        heads = {k: v for k, v in weights.items() if not k.startswith(MODEL_PREFIX) or is_unmerged(k)}
        with sealing(folder) as seal:
            # the largest first: it is digested while the others are written
            write_tensors(moments, folder / "moments.safetensors")
            seal.add(folder / "moments.safetensors")
            self._write_weights(folder / "weights", model)
            seal.add(folder / "weights")
            write_tensors(heads, folder / "heads.safetensors")
            seal.add(folder / "heads.safetensors")
            state = {**progress._asdict(), _SEALED: True}
            (folder / "state.json").write_text(json.dumps(state, indent=1))
            seal.add(folder / "state.json")

    def _put(self, partial: Path, final: Path) -> None:
        """Rename the folder to the name of its step, and remove a damaged or abandoned checkpoint of that name."""
        replaced = self._folder / f".{final.name}.replaced"
        if final.exists():
            self._remove(replaced)
            os.replace(final, replaced)
        put_folder(partial, final)
        self._remove(replaced)

    def _aged(self, newest: Path) -> list[Path]:
        """The checkpoints to delete, now that `newest` is complete and LAST names it."""
        config = self._config
        # later steps are of a time before the run went back, so they were saved earlier
        others = sorted(
            (path for path in checkpoints_in(self._folder) if path != newest),
            key=lambda path: (step_of(path) < step_of(newest), step_of(path)),
        )
        aged = others[: max(0, len(others) - (config.keep - 1))]
        every = config.keep_every_steps
        return [path for path in aged if not every or step_of(path) % every]

    def _remove(self, path: Path) -> None:
        """Remove a folder. A failure is logged once and does not end the run."""
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            if path not in self._not_removed:
                log.warning("cannot remove %s: %s; the run goes on, please remove it", path, said(error))
            self._not_removed.add(path)


class Saved(NamedTuple):
    """A checkpoint in memory."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    progress: Progress


def read(folder: Path) -> Saved:
    """Read a checkpoint. Raises `UserError` when a file is missing or cannot be read."""
    progress, heads, moments = read_progress(folder), read_heads(folder), read_moments(folder)
    with _readable(folder):
        model = load_file(folder / "weights" / "model.safetensors")
    weights = {MODEL_PREFIX + name: tensor for name, tensor in model.items()}
    for name in filter(is_unmerged, heads):
        weights.pop(merged_name(name), None)
    weights.update(heads)
    return Saved(weights, moments, progress)


def read_progress(folder: Path) -> Progress:
    """How far the run was. Raises `UserError` as `read` does."""
    with _readable(folder):
        return _read_state(folder)[0]


def read_heads(folder: Path) -> dict[str, Tensor]:
    """What objectives own, and layers with adapters. Raises `UserError` as `read` does."""
    with _readable(folder):
        return load_file(folder / "heads.safetensors")


def read_moments(folder: Path) -> dict[str, Tensor]:
    """AdamW's state as `engine.gather_moments` gave it. Raises `UserError` as `read` does."""
    step = torch.tensor(read_progress(folder).step)
    with _readable(folder):
        moments = load_file(folder / "moments.safetensors")
    # earlier versions wrote no counts: every parameter had taken all steps of its run
    names = {name.rpartition(".")[0] for name in moments}
    return {**{f"{name}.{engines.STEP}": step for name in names}, **moments}


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from None


def _read_state(folder: Path) -> tuple[Progress, bool]:
    """The progress, and whether a manifest belongs to this checkpoint."""
    state = json.loads((folder / "state.json").read_text())
    is_sealed = bool(state.pop(_SEALED, False))
    return Progress(**{**state, "pretrained": tuple(state.get("pretrained", ()))}), is_sealed


def fault_of(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None where it is as it was written.

    One of an earlier version has no manifest: only whether its files can be opened is seen then.
    """
    found = damage(folder)
    if found is not None:
        return found
    try:
        _, is_sealed = _read_state(folder)
        for name in ("weights/model.safetensors", "heads.safetensors", "moments.safetensors"):
            # compares the size of the file with what its header says
            with safe_open(folder / name, framework="pt"):
                pass
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        return said(error)
    return f"{MANIFEST} is missing" if is_sealed and not has_manifest(folder) else None


def has_manifest(folder: Path) -> bool:
    """Whether the files of a checkpoint can be compared with what was written."""
    return (folder / MANIFEST).is_file()


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


def check_moments(model: nn.Module, moments: Mapping[str, Tensor]) -> None:
    """Raise a `UserError` where a resumed run trains parameters that were frozen before."""
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and f"{name}.{engines.MOMENTS[0]}" not in moments
    ]
    if missing:
        raise UserError(
            f"the checkpoint has no optimizer state for {missing[0]} ({len(missing)} such): it was frozen in that run; "
            "start a new run with init_from instead, which can take the moments of the others along (carry_over)"
        )
