"""A run as a source: its newest checkpoint, the folder with its config, and the classification heads it trained."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from siglip_train.errors import UserError
from siglip_train.files.manifest import check
from siglip_train.files.records import read_text
from siglip_train.interop.files import read_tensors
from siglip_train.objectives.classification import Classification

log = logging.getLogger(__name__)

HEADS = "heads.safetensors"
# beside the checkpoints of a run, the name of the newest complete one
LAST = "LAST"
# what the names of the teacher's tower in HEADS begin with, before and with the tower's own
_TEACHER = "teacher.copies."
_TEACHERS_TOWER = f"{_TEACHER}vision."
_TARGET = f"{Classification.__module__}.{Classification.__qualname__}"


def checkpoint_name(step: int) -> str:
    """The name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint's folder says."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `RUN/checkpoints`, the latest step first, whole or not; what was set aside is none of them."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir())
    return sorted(found, key=step_of, reverse=True)


def last_checkpoint(folder: Path) -> Path | None:
    """What LAST in `RUN/checkpoints` names; None where there is no LAST, or it names nothing that is there."""
    named = folder / read_text(folder / LAST).strip()
    return next((path for path in checkpoints_in(folder) if path == named), None)


def newest_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run, or in a folder of checkpoints; any other path as it is."""
    for folder in (path / "checkpoints", path):
        there, last = checkpoints_in(folder), last_checkpoint(folder)
        if not there and (folder / LAST).is_file():
            raise UserError(f"{folder / LAST} names {read_text(folder / LAST).strip()}, which is not there")
        if not there:
            continue
        if last is None:
            log.warning("%s names no checkpoint that is there: %s is taken", folder / LAST, there[0].name)
        return last or there[0]
    return path


def run_folder(source: Path) -> Path | None:
    """The run that `source` is, or is a part of: a checkpoint, or the weights in one."""
    return next((p for p in (source, *source.parents[:3]) if (p / "config.yaml").is_file()), None)


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, which no run writes: a few lines of them unfold to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds aliases (*name), which no run writes")
        return super().compose_node(parent, index)


def run_config(run: Path) -> dict[str, Any]:
    """The composed config of a run, which may be a stranger's. Raises `UserError` where the file is damaged."""
    path = run / "config.yaml"
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no config")
    return content


def is_classification(node: Any) -> bool:
    """Whether a node of `objectives` is a classification head."""
    return isinstance(node, dict) and node.get("_target_") == _TARGET


def read_heads(path: Path) -> dict[str, Classification]:
    """The classification heads of a run (its newest checkpoint) or of a checkpoint inside its run, by name.

    Empty for every other model, and for a checkpoint without its run, whose config says what a head reads. Raises
    `UserError` where that config does not fit the weights.
    """
    file = newest_checkpoint(path) / HEADS
    run = run_folder(file.parent)
    if run is None or not file.is_file():
        return {}
    nodes = run_config(run).get("objectives")
    check(file.parent, within=HEADS)
    tensors = read_tensors(file)
    heads = {}
    for name, node in nodes.items() if isinstance(nodes, dict) else ():
        if not is_classification(node):
            continue
        prefix = f"objectives.{name}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        try:
            # without memory of its own: sizes that the weights do not have would take it before they are compared
            with torch.device("meta"):
                head = Classification(**{key: value for key, value in node.items() if key != "_target_"})
            head.load_state_dict(own, assign=True)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"objectives.{name} in {run / 'config.yaml'} does not fit {file}: {reason}"
            ) from None
        heads[name] = head.eval()
    return heads


def read_teachers_tower(path: Path) -> dict[str, Tensor]:
    """The vision tower of the teacher, a moving average (EMA), of a run (its newest checkpoint) or of a checkpoint.

    By names of the model, `vision.…`. Raises `UserError` where there is none.
    """
    file = (path.parent if path.name == "weights" else newest_checkpoint(path)) / HEADS
    tensors: dict[str, Tensor] = {}
    if file.is_file():
        check(file.parent, within=HEADS)
        tensors = read_tensors(file)
    found = {
        name.removeprefix(_TEACHER): tensor
        for name, tensor in tensors.items()
        if name.startswith(_TEACHERS_TOWER)
    }
    if not found:
        raise UserError(
            f"{path} has no averaged vision tower: give a run, or a checkpoint, with self-distillation or masked "
            "prediction and ema.scope=tower_and_head"
        )
    return found


def read_head(path: Path, name: str | None) -> Classification:
    """The head `name`, or the only one. Raises `UserError` where there is none, or several and no name."""
    heads = read_heads(path)
    if not heads:
        raise UserError(
            f"{path} has no classification head: give a run with objective=classification, or a checkpoint inside it"
        )
    if name is None and len(heads) > 1:
        raise UserError(
            f"{path} has several classification heads: choose with --objective {' or '.join(heads)}"
        )
    if name is not None and name not in heads:
        raise UserError(f"{path} has no classification head {name}, only {', '.join(heads)}")
    return heads[name or next(iter(heads))]
