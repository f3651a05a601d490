"""What a batch can hold: an `Input` reads its part of a sample, and puts rows together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from siglip_train.data.choices import Choices
from siglip_train.data.config import DataConfig, SourceConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.shards.reader import RawSample, ShardReader
from siglip_train.data.tokenizer import Tokenizer

# gives an empty tensor of a shape and a dtype, in the memory that a batch travels in
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


class RunInputs(NamedTuple):
    """What the batches of a run hold, and what it is made with.

    kinds: the classes of inputs that its objectives name. transform, tokenizer: of the model. embedding_dir: of a
    locked tower, None = there is none.
    """

    kinds: "tuple[type[Input], ...]"
    transform: ImageTransform
    tokenizer: Tokenizer | None
    embedding_dir: Path | None = None


class InputSetup(NamedTuple):
    """What one input is made from: a source, as the config has it, the reader of its shards, the run, and its options.

    data: where an input has its keys (`data.views`).
    """

    name: str
    source: SourceConfig
    reader: ShardReader
    run: RunInputs
    data: DataConfig


class Input:
    """One thing that batches hold, as one source gives it. Objectives name the classes that they need.

    part: the name of its part of a `Batch`. row_bytes: the most that a row takes of memory shared with workers, 0 where
    rows are small.
    """

    part: ClassVar[str]
    row_bytes = 0

    def __init__(self, setup: InputSetup) -> None:
        """Prepare to read one source.  # all ranks"""

    @classmethod
    def is_absent(cls, source: SourceConfig) -> bool:
        """Whether this source, beside others that have texts, has nothing to read: its rows are empty then."""
        return False

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        """The members of a sample that it reads: `image`, or extensions.

        Raises `UserError` with the key to set where the source called `name` does not say where they are.
        """
        raise NotImplementedError

    def decide(self, sample: RawSample, choices: Choices) -> None:
        """Take decisions that other inputs are to follow; called before any `make`. Raises `SampleError`."""

    def make(self, sample: RawSample, choices: Choices) -> Any:
        """One row. Raises `SampleError` for a sample that cannot be used."""
        raise NotImplementedError

    def collate(self, rows: list[Any], empty: Empty) -> Any:
        """Put B rows together: nested tensors (tuples, dicts) of B rows each, the large ones taken from `empty`."""
        raise NotImplementedError
