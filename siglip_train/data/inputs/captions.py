"""The caption of a sample, which of its texts is drawn, as tokens: for the text tower, and for the decoder."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from siglip_train.data.choices import Choices
from siglip_train.data.config import SourceConfig
from siglip_train.data.inputs.base import Empty, Input, InputSetup
from siglip_train.data.sentences import Sentence, SentenceForm, Sentences
from siglip_train.data.shards.fields import CaptionChoice
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
        self._tokenizer, self._choice = setup.run.tokenizer, _choice(setup.source)

    @classmethod
    def is_absent(cls, source: SourceConfig) -> bool:
        """Where its `text` is null."""
        return source.text is None

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
        """One caption, "" where the source has none."""
        return "" if self._choice is None else _caption(self._choice, sample, choices)

    def collate(self, rows: list[Any], empty: Empty) -> Tensor:
        """Tokenise them together."""
        return self._tokenizer(rows)


class TextPresenceInput(Input):
    """`[B]` bool, whether a sample has a caption: in batches of sources with texts and others without."""

    part = "has_text"

    def __init__(self, setup: InputSetup) -> None:
        self._has_text = setup.source.text is not None

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        """None."""
        return ()

    def make(self, sample: RawSample, choices: Choices) -> bool:
        """As its source says."""
        return self._has_text

    def collate(self, rows: list[Any], empty: Empty) -> Tensor:
        """Put them together."""
        return torch.tensor(rows, dtype=torch.bool)


class CaptionSentences(NamedTuple):
    """The captions of B samples for the decoder. draw: `[B]` float32 in 0..1, by which an objective decides how."""

    sentences: Sentences
    draw: Tensor


class CaptionSentenceInput(Input):
    """`CaptionSentences`: the captions that the text tower gets, with the prefix of their task.

    The number drawn for each sample belongs to its place in the run, and not to a rank or a micro-batch.
    """

    part = "caption_sentences"

    def __init__(self, setup: InputSetup) -> None:
        if setup.run.tokenizer is None:
            raise UserError("captions need a tokenizer: tokenizer=PATH to a .model or a tokenizer.json")
        self._form = SentenceForm(setup.data.sentences, setup.run.tokenizer)
        self._choice = _choice(setup.source)

    @classmethod
    def is_absent(cls, source: SourceConfig) -> bool:
        """Where its `text` is null."""
        return source.text is None

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        """Those that can hold a caption."""
        return CaptionInput.members(name, source)

    def make(self, sample: RawSample, choices: Choices) -> tuple[Sentence | None, float]:
        """One caption, None where the source has none, and the number drawn."""
        caption = (
            None if self._choice is None else self._form.caption(_caption(self._choice, sample, choices))
        )
        return caption, choices.generator.random()

    def collate(self, rows: list[Any], empty: Empty) -> CaptionSentences:
        """Put them together."""
        draws = np.array([draw for _, draw in rows], dtype=np.float32)
        return CaptionSentences(self._form.rows([sentence for sentence, _ in rows]), torch.from_numpy(draws))


def _choice(source: SourceConfig) -> CaptionChoice | None:
    return None if source.text is None else CaptionChoice(source.text)


def _caption(choice: CaptionChoice, sample: RawSample, choices: Choices) -> str:
    return choices.once("caption", lambda generator: choice.draw(sample, generator))
