"""What the json member of a sample says: read for tools that look at more than the caption."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# `objects` is the shard format's own name; other sets say `boxes`
BOX_FIELDS = ("objects", "boxes")
_LANGUAGE_FIELDS = ("language", "lang")


class Box(NamedTuple):
    """A labelled box as it stands in the json; `corners` should be x0, y0, x1, y1 in 0..1, but may be anything."""

    place: str
    label: str
    corners: Any


def boxes(facts: Mapping[str, Any], fields: Sequence[str] = BOX_FIELDS) -> Iterator[Box]:
    """Every entry of these fields that has a box, right or wrong."""
    for name in fields:
        entries = facts.get(name)
        for number, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, dict) and "box" in entry:
                yield Box(f"{name}[{number}]", str(entry.get("label", entry.get("text", ""))), entry["box"])


def are_corners(corners: Any) -> bool:
    """Is this x0 < x1 and y0 < y1, all four in 0..1?"""
    if not isinstance(corners, list) or len(corners) != 4:
        return False
    if not all(isinstance(value, int | float) for value in corners):
        return False
    x0, y0, x1, y1 = corners
    return 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def language(facts: Mapping[str, Any]) -> str:
    """The language of `txt`, "" where it is not known."""
    return next((str(facts[name]) for name in _LANGUAGE_FIELDS if facts.get(name)), "")
