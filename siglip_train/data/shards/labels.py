"""The classes of a sample: one index for training, all that are right for evaluation."""

import io

import numpy as np

from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import SampleError


def class_label(label: Field, sample: RawSample) -> int:
    """The class index that stands in `label`. Raises `SampleError` where there is none, or something else."""
    value = label.first(sample)
    try:
        # a fraction or a truth value is no class
        return int(value if isinstance(value, str) or type(value) is int else "")
    except ValueError:
        raise SampleError("bad label", f"{label.text} is {value!r}, not an integer") from None


def labels_of(label: Field, sample: RawSample) -> tuple[int, ...]:
    """The classes a sample belongs to; none where its list is empty. Raises `SampleError`."""
    if label.member == "npy":
        return _set_bits(sample.members.get("npy", b""))
    values = [value for _, value in label.values(sample)]
    if not values and label.empty_list(sample):
        return ()  # as in ReaL, where no label was agreed upon
    try:
        # a fraction or a truth value is no class
        return tuple(
            int(value if isinstance(value, str) or type(value) is int else "") for value in values or [None]
        )
    except ValueError:
        shown = values if len(values) > 1 else next(iter(values), None)
        raise SampleError("bad label", f"{label.text} is {shown!r}, not an integer") from None


def _set_bits(data: bytes) -> tuple[int, ...]:
    try:
        vector = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SampleError("bad label", f"npy: {error}") from None
    return tuple(np.flatnonzero(vector).tolist())
