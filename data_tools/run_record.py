"""The record, in a folder of shards, of the command that made it: what makes running it again safe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip_train.errors import UserError


def earlier_record(out_dir: Path, name: str, generator: str) -> dict[str, Any] | None:
    """The record `name` of an earlier run of `generator`, None for a folder that is new or empty.

    Raises `UserError` where something else is there.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    try:
        present = json.loads((out_dir / name).read_text())
    except (OSError, ValueError):
        present = None
    if not isinstance(present, dict) or present.get("generator") != generator:
        raise UserError(f"{out_dir} exists and was not made by {generator}: name another folder")
    return present


def require_same(out_dir: Path, present: Mapping[str, Any], record: Mapping[str, Any], did: str) -> None:
    """Raise `UserError` that names what differs between two runs; `did` as in "packed"."""
    changed = [f"{key} {present.get(key)}, now {value}" for key, value in record.items()
               if present.get(key) != value]  # fmt: skip
    if changed:
        raise UserError(
            f"{out_dir} was {did} from another source or with other options ({'; '.join(changed)}): "
            "name another folder, or remove this one"
        )
