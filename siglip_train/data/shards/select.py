"""Which samples of a set of shards, by their keys: a held-out part without packing the shards anew."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Selection:
    """Samples whose key `keys` finds (re.search), and of those the train or the held-out part.

    keys: regular expression that finds something in a key. held_out: share of the groups that is held out, by a hash of
    the group, so that it does not depend on the seed or on what else the shards hold. by: regular expression whose
    first group names what must not be torn apart (all captions of one image, say); default: every key for itself.
    part: which of the two is meant here.
    """

    keys: str = ""
    held_out: float = 0.0
    by: str = "(.*)"
    part: Literal["train", "held_out"] = "train"

    def __post_init__(self) -> None:
        """Check the expressions and the share."""
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be a share in 0..1, got {self.held_out}")
        if self.part not in ("train", "held_out"):
            raise ValueError(f"part must be train or held_out, got {self.part!r}")
        for name in ("keys", "by"):
            try:
                groups = re.compile(getattr(self, name)).groups
            except re.error as error:
                raise ValueError(f"{name} is not a regular expression: {error}") from None
            if name == "by" and groups != 1:
                raise ValueError(f"by must have one group, {self.by!r} has {groups}")

    def __contains__(self, key: str) -> bool:
        """Whether the sample of this key is meant; a key that `by` does not find is never held out."""
        if not re.search(self.keys, key):
            return False
        found = re.search(self.by, key)
        is_held_out = found is not None and _fraction(found[1]) < self.held_out
        return is_held_out == (self.part == "held_out")


EVERYTHING = Selection()


def as_selection(values: Selection | Mapping[str, Any]) -> Selection:
    """A selection from the fields that stand in a config."""
    return values if isinstance(values, Selection) else Selection(**values)


def _fraction(group: str) -> float:
    """A number in 0..1 that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest()) / 2**64
