"""Which of a sample's texts is its caption: fields, with probabilities, one drawn for each sample."""

from collections.abc import Mapping, Sequence

import numpy as np

from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import SampleError, UserError


class CaptionChoice:
    """Draws the caption of a training sample.

    spec: one field (`txt`, `json:caption`), or fields with the probabilities to take them. A field that holds a
    list or mapping gives one of its texts, each as likely. Where the field drawn is missing, empty or broken, the
    others are drawn in its place.
    """

    def __init__(self, spec: str | Mapping[str, float]) -> None:
        choices = {spec: 1.0} if isinstance(spec, str) else dict(spec)
        if not choices or min(choices.values()) < 0 or sum(choices.values()) <= 0:
            raise UserError(f"text is {spec!r}, but must be a field or a mapping of fields to probabilities")
        self.fields = [Field.parse(name) for name in choices]
        self.probabilities = np.array(list(choices.values()), dtype=np.float64)

    @property
    def members(self) -> tuple[str, ...]:
        """The members that can hold a caption."""
        return tuple(dict.fromkeys(field.member for field in self.fields))

    def draw(self, sample: RawSample, rng: np.random.Generator) -> str:
        """One caption. Raises `SampleError` where no field has one."""
        left, weights = list(self.fields), self.probabilities
        failure = None
        while left and weights.sum() > 0:
            place = int(rng.choice(len(left), p=weights / weights.sum())) if len(left) > 1 else 0
            try:
                texts = left[place].texts(sample)
            except SampleError as error:
                failure, texts = failure or error, []
            if texts:
                return texts[int(rng.integers(len(texts))) if len(texts) > 1 else 0][1]
            left.pop(place)
            weights = np.delete(weights, place)
        raise failure or no_caption(self.fields, sample)


def no_caption(fields: Sequence[Field], sample: RawSample) -> SampleError:
    """The fault of a sample whose fields can be read and hold no text: they are empty, or hold something else."""
    for field in fields:
        value = next((value for _, value in field.values(sample) if not isinstance(value, str | None)), None)
        if value is not None:
            return SampleError(
                "caption is no text", f"{field.text} is {value!r:.60}; is this the field of captions?"
            )
    return SampleError("empty caption", f"no text in {', '.join(field.text for field in fields)}")
