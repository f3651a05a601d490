"""The caption of a sample, as tokens: which of its texts is drawn."""

from typing import Any

from torch import Tensor

from siglip_train.data.choices import Choices
from siglip_train.data.config import SourceConfig
from siglip_train.data.inputs.base import Empty, Input, InputSetup
from siglip_train.data.shards.caption_choice import CaptionChoice
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import UserError


class CaptionInput(Input):
    """Tokens `[B, context_length]` int64."""

    part = "texts"

    def __init__(self, setup: InputSetup) -> None:
        if setup.run.tokenizer is None:
            raise UserError(
                "captions need a tokenizer: tokenizer=PATH to a .model, a tokenizer.json or a folder with one"
            )
        self._tokenizer, self._choice = setup.run.tokenizer, CaptionChoice(setup.source.text)

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        """Those that can hold a caption."""
        if source.text is None:
            raise UserError(
                f"data.sources.{name}.text is null, and an objective needs captions: set it, or leave the objective out"
                " (objectives.NAME=null)"
            )
        return CaptionChoice(source.text).members

    def make(self, sample: RawSample, choices: Choices) -> str:
        """One caption."""
        return self._choice.draw(sample, choices.generator)

    def collate(self, rows: list[Any], empty: Empty) -> Tensor:
        """Tokenise them together."""
        return self._tokenizer(rows)
