"""The class of a sample."""

from typing import Any

import torch
from torch import Tensor

from siglip_train.data.choices import Choices
from siglip_train.data.config import SourceConfig
from siglip_train.data.inputs.base import Empty, Input, InputSetup
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.labels import class_label
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import UserError


class LabelInput(Input):
    """Class indices `[B]` int64."""

    part = "labels"

    def __init__(self, setup: InputSetup) -> None:
        self._label = _field(setup.name, setup.source)

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        """The one that holds the label."""
        return (_field(name, source).member,)

    def make(self, sample: RawSample, choices: Choices) -> int:
        """The class index."""
        return class_label(self._label, sample)

    def collate(self, rows: list[Any], empty: Empty) -> Tensor:
        """Put them in a row."""
        return torch.tensor(rows)


def _field(name: str, source: SourceConfig) -> Field:
    if source.label is None:
        raise UserError(
            f"data.sources.{name}.label is null, and an objective needs labels: set it to the member (cls) or field"
            " (json:class) with the class index"
        )
    return Field.parse(source.label)
