"""JSON that a run is still writing, or was killed while writing: what is whole is read, the rest passed over."""

import json
import math
from pathlib import Path
from typing import Any


def to_json(content: Any, *, indent: int | None = None) -> str:
    """`content` as JSON that every reader takes: numbers that are not finite, for which it has no form, become null."""
    try:
        return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; none where there is no file."""
    return [record for line in read_text(path).splitlines() if (record := parse_record(line)) is not None]


def parse_record(text: str) -> dict[str, Any] | None:
    """A JSON object; None for anything else, such as the line that was being written when the run was killed."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def read_text(path: Path) -> str:
    """The text of a file, whatever its bytes; empty where there is no file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
