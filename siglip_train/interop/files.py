"""The two kinds of files every weight format is made of: JSON and safetensors. Damage is a `UserError`."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from siglip_train.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; where it was split, all files that `<path>.index.json` names."""
    index = path.with_name(path.name + ".index.json")
    if path.is_file():
        return _read_one(path)
    if index.is_file():
        tensors: dict[str, Tensor] = {}
        for name in sorted(set(read_json(index).get("weight_map", {}).values())):
            tensors.update(_read_one(path.with_name(name)))
        return tensors
    raise UserError(f"{path} does not exist; weights are read from safetensors files only")


def _read_one(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}; copy the file again") from error


def shortened(names: set[str] | list[str], limit: int = 6) -> str:
    """Names for a message: sorted, at most `limit` of them, and how many more."""
    ordered = sorted(names)
    more = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {more} more" if more > 0 else "")
