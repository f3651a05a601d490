"""A tally as JSON and back, so that the counts of shards already read outlive an interrupted run."""

from array import array
from collections import Counter
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from data_tools.stats.counters import BadSamples, Distinct, Distribution, Frequent
from data_tools.stats.tally import Shown, Tally
from siglip_train.data.shards.faults import BadSample

_PARTS = {part.__name__: part for part in (Tally, Distribution, Frequent, Distinct, BadSamples)}
_ROWS = {row.__name__: row for row in (BadSample, Shown)}


def to_json(value: Any) -> Any:
    """A tally, or a part of one, as what `json` writes."""
    if is_dataclass(value):
        return {
            "part": type(value).__name__,
            **{f.name: to_json(getattr(value, f.name)) for f in fields(value)},
        }
    if isinstance(value, Counter):
        return {"counts": list(value.items())}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "numbers": value.tolist()}
    if isinstance(value, array):
        return {"typecode": value.typecode, "numbers": value.tolist()}
    if isinstance(value, list):
        # of one kind of named tuple, which json would write without its name
        return {"rows": type(value[0]).__name__ if value else "", "values": value}
    return value


def from_json(content: Any) -> Any:
    """The same tally."""
    if not isinstance(content, dict):
        return content
    if "part" in content:
        return _PARTS[content.pop("part")](**{name: from_json(value) for name, value in content.items()})
    if "counts" in content:
        return Counter(dict(content["counts"]))
    if "dtype" in content:
        return np.array(content["numbers"], dtype=content["dtype"])
    if "typecode" in content:
        return array(content["typecode"], content["numbers"])
    return [_ROWS[content["rows"]](*map(_tuples, row)) for row in content["values"]]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
