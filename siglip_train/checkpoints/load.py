"""Reads checkpoints, tells what is wrong with one, and restores weights. Which one a run takes: `resume.py`."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from siglip_train import engine_state
from siglip_train.checkpoints.write import MODEL_PREFIX, SEALED, Progress
from siglip_train.errors import UserError, said
from siglip_train.files.manifest import MANIFEST, damage
from siglip_train.models.adapters import is_unmerged, merged_name


class Saved(NamedTuple):
    """A checkpoint in memory."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    progress: Progress


def read_checkpoint(folder: Path) -> Saved:
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
    """How far the run was. Raises `UserError` as `read_checkpoint` does."""
    with _readable(folder):
        return _read_state(folder)[0]


def read_heads(folder: Path) -> dict[str, Tensor]:
    """What objectives own, and layers with adapters. Raises `UserError` as `read_checkpoint` does."""
    with _readable(folder):
        return load_file(folder / "heads.safetensors")


def read_moments(folder: Path) -> dict[str, Tensor]:
    """AdamW's state as `engine_state.gather_moments` gave it. Raises `UserError` as `read_checkpoint` does."""
    step = torch.tensor(read_progress(folder).step)
    with _readable(folder):
        moments = load_file(folder / "moments.safetensors")
    # earlier versions wrote no counts: every parameter had taken all steps of its run
    names = {name.rpartition(".")[0] for name in moments}
    return {**{f"{name}.{engine_state.STEP}": step for name in names}, **moments}


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from None


def _read_state(folder: Path) -> tuple[Progress, bool]:
    """The progress, and whether a manifest belongs to this checkpoint."""
    state = json.loads((folder / "state.json").read_text())
    is_sealed = bool(state.pop(SEALED, False))
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
    # each once, also what two modules share
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
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
        model.load_state_dict(saved.weights, strict=False)


def check_moments(model: nn.Module, moments: Mapping[str, Tensor]) -> None:
    """Raise a `UserError` where a resumed run trains parameters that were frozen before."""
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and f"{name}.{engine_state.MOMENTS[0]}" not in moments
    ]
    if missing:
        raise UserError(
            f"the checkpoint has no optimizer state for {missing[0]} ({len(missing)} such): it was frozen in that run; "
            "start a new run with init_from instead, which can take the moments of the others along (carry_over)"
        )
