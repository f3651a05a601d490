"""Classes of labelled samples: numbers from whatever a source calls them, and captions made of their names."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from siglip_train.data.prompts import fill, read_templates
from siglip_train.errors import SampleError, UserError


class Labels(NamedTuple):
    """One label for each sample, None = it has none; names: of the classes in the order of the labels, if known."""

    of: list[int | SampleError | None]
    names: list[str]


def number_classes(values: Sequence[Any], names: Sequence[str] = ()) -> Labels:
    """Labels of what a column holds.

    names: of the classes, where the source says them. Without, numbers are labels themselves, and texts count in
    sorted order. null, an empty text and -1 (as Hugging Face writes it) mean that there is no label.
    """
    values = [value.strip() if isinstance(value, str) else value for value in values]
    present = [value for value in values if not _is_absent(value)]
    names = list(names)
    if not names and not all(_as_number(value) is not None for value in present):
        names = sorted({value for value in present if isinstance(value, str)})
    places = {name: place for place, name in enumerate(names)}
    return Labels([None if _is_absent(value) else _label(value, places) for value in values], names)


def _is_absent(value: Any) -> bool:
    return value is None or value in ("", -1, "-1") or value != value


def _as_number(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isdecimal() else None
    # a truth value is no class; a column with gaps comes as fractions
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    return int(value) if is_whole and value >= 0 else None


def _label(value: Any, places: dict[str, int]) -> int | SampleError:
    if isinstance(value, str) and value in places:
        return places[value]
    number = _as_number(value)
    if number is None or (places and number >= len(places)):
        known = f"one of {len(places)} classes" if places else "a whole number from 0 on"
        return SampleError("bad label", f"{value!r:.60} is not {known}")
    return number


def check_templates(templates: Sequence[str], names: Sequence[str]) -> None:
    """Raise `UserError` where captions cannot be made of them."""
    read_templates(list(templates))
    if not names:
        raise UserError("--caption-template needs names of classes, and the source says none")


def caption_of(key: str, name: str, templates: Sequence[str]) -> str:
    """The name in one of the templates, always the same for a key."""
    return fill(templates[zlib.crc32(key.encode("utf-8", "backslashreplace")) % len(templates)], name)
