"""What the decoder reads and writes: captions, expressions with their box, boxes with their text, as rows of tokens.

`PREFIX caption`, `PREFIX text : box` and `PREFIX box : text` (LocCa, section 3.1). A box is four whole numbers as
ordinary text. Each piece is tokenised by itself, so that a prompt is exactly the beginning of what was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import UserError

# left, top, right, bottom, as shares of the image's width and height
RelativeBox = tuple[float, float, float, float]


@dataclass
class SentenceConfig:
    """How captions and regions are written for the decoder; what the papers leave open stands in objectives/README.md.

    context_length: tokens of a sentence, prefix and end included. region_tokens: a region's text is cut to so many, so
    that its box has room. cap, arf, gcap: the prefixes of a caption, of an expression and its box, of a box and its
    text. separator: between text and box. box_order: of the coordinates; yxyx = ymin xmin ymax xmax. box_bins: the
    number that stands for the right and the lower edge of the image.
    """

    context_length: int = 64
    region_tokens: int = 32
    cap: str = "cap:"
    arf: str = "aref:"
    gcap: str = "gcap:"
    separator: str = ":"
    box_order: Literal["yxyx", "xyxy"] = "yxyx"
    box_bins: int = 500

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.box_order not in ("yxyx", "xyxy"):
            raise ValueError(f"box_order is {self.box_order!r}: choose yxyx or xyxy")
        if not 1 <= self.box_bins <= 9999:
            raise ValueError(f"box_bins must be in 1..9999, got {self.box_bins}")
        if self.region_tokens < 1 or self.context_length < self.region_tokens:
            raise ValueError(
                f"region_tokens must be at least 1 and fit into context_length, got {self.region_tokens} of "
                f"{self.context_length}"
            )


class Sentences(NamedTuple):
    """One sentence for each of B samples.

    tokens: `[B, context_length]` int64. counted: `[B, context_length]` bool, the tokens that are to be predicted: what
    follows the prefix, the end included. None is counted in the row of a sample that has no such sentence.
    """

    tokens: Tensor
    counted: Tensor


class Sentence(NamedTuple):
    """One sentence as token ids, the end included, and how many of them are its prefix."""

    ids: list[int]
    prefix: int


class _Beginning(NamedTuple):
    """Tokens with which numbers begin: those that are one token longer, and the numbers."""

    longer: list[tuple[int, ...]]
    numbers: list[int]


def _beginnings(numbers: Sequence[Sequence[int]]) -> dict[tuple[int, ...], _Beginning]:
    found: dict[tuple[int, ...], _Beginning] = {}
    for number, ids in enumerate(numbers):
        for length in range(len(ids) + 1):
            found.setdefault(tuple(ids[:length]), _Beginning([], [])).numbers.append(number)
    for beginning in list(found):
        if beginning:
            found[beginning[:-1]].longer.append(beginning)
    return found


class SentenceForm:
    """Writes sentences as `config` says, with the model's tokenizer. Raises `UserError` where a box leaves no room."""

    def __init__(self, config: SentenceConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        encode = tokenizer.encoder.encode
        self.prefixes = {task: encode(getattr(config, task)) for task in ("cap", "arf", "gcap")}
        self.separator = encode(f" {config.separator}")
        self.numbers = [encode(f" {number}") for number in range(config.box_bins + 1)]
        self._number_of = {tuple(ids): number for number, ids in enumerate(self.numbers)}
        self._beginnings = _beginnings(self.numbers)
        if len(self._number_of) <= config.box_bins:
            raise UserError(
                f"tokenizer {tokenizer.name}: it writes several of the numbers 0 to {config.box_bins} alike, so that "
                "no box can be told: take one that knows digits"
            )
        needed = max(map(len, self.prefixes.values())) + len(self.separator) + 1
        needed += config.region_tokens + 4 * max(map(len, self.numbers))
        if needed > config.context_length:
            raise UserError(
                f"data.sentences.context_length: a text of {config.region_tokens} tokens and a box, which takes "
                f"{4 * max(map(len, self.numbers))} in this tokenizer, need {needed}, and it is "
                f"{config.context_length}: raise it, or lower data.sentences.region_tokens"
            )

    def text(self, text: str, most: int) -> list[int]:
        """The first tokens of a text."""
        return self.tokenizer.encode(f" {text.strip()}")[:most]

    def box(self, box: RelativeBox) -> list[int]:
        """The tokens of a box."""
        return [token for number in self.box_numbers(box) for token in self.numbers[number]]

    def box_numbers(self, box: RelativeBox) -> list[int]:
        """The four numbers of a box, in the order they are written in."""
        left, top, right, bottom = (round(edge * self.config.box_bins) for edge in box)
        return [top, left, bottom, right] if self.config.box_order == "yxyx" else [left, top, right, bottom]

    def box_of(self, ids: Sequence[int]) -> RelativeBox | None:
        """The box that stands at the beginning of some tokens; None where none does, or one without an area."""
        numbers, begin = list[int](), 0
        while len(numbers) < 4 and begin < len(ids):
            lengths = range(len(ids) - begin, 0, -1)
            end = next((begin + n for n in lengths if tuple(ids[begin : begin + n]) in self._number_of), None)
            if end is None:
                return None
            numbers.append(self._number_of[tuple(ids[begin:end])])
            begin = end
        if len(numbers) < 4:
            return None
        if self.config.box_order == "yxyx":
            numbers = [numbers[place] for place in (1, 0, 3, 2)]
        left, top, right, bottom = (number / self.config.box_bins for number in numbers)
        return (left, top, right, bottom) if left < right and top < bottom else None

    def box_continuations(self, written: Sequence[int]) -> list[int]:
        """The tokens that may follow those `written` of a box: whole ones have an area, and end after four numbers."""
        numbers, current = list[int](), tuple[int, ...]()
        for token in written:
            if (*current, token) in self._beginnings:
                current = (*current, token)
            else:
                numbers.append(self._number_of[current])
                current = (token,)
        lowest, highest = self._bounds(numbers)
        found = [
            token for token in self._following(current) if self._reaches((*current, token), lowest, highest)
        ]
        if lowest <= self._number_of.get(current, -1) <= highest:
            numbers.append(self._number_of[current])
            if len(numbers) == 4:
                return [*found, self.tokenizer.eos_id]
            lowest, highest = self._bounds(numbers)
            found += [token for token in self._following(()) if self._reaches((token,), lowest, highest)]
        return found

    def _bounds(self, numbers: Sequence[int]) -> tuple[int, int]:
        """The next number of a box: the first two leave room for the others, which lie beyond them."""
        bins = self.config.box_bins
        return (0, bins - 1) if len(numbers) < 2 else (numbers[len(numbers) - 2] + 1, bins)

    def _following(self, beginning: tuple[int, ...]) -> list[int]:
        return [longer[-1] for longer in self._beginnings[beginning].longer]

    def _reaches(self, beginning: tuple[int, ...], lowest: int, highest: int) -> bool:
        return any(lowest <= number <= highest for number in self._beginnings[beginning].numbers)

    def caption(self, text: str) -> Sentence:
        """A caption."""
        prefix = self.prefixes["cap"]
        return self._sentence(prefix, self.text(text, self.config.context_length - len(prefix) - 1))

    def expression(self, text: str, box: RelativeBox) -> Sentence:
        """A region's text, then its box."""
        return self._sentence(
            self.prefixes["arf"],
            [*self.text(text, self.config.region_tokens), *self.separator, *self.box(box)],
        )

    def grounded(self, box: RelativeBox, text: str) -> Sentence:
        """A region's box, then its text."""
        return self._sentence(
            self.prefixes["gcap"],
            [*self.box(box), *self.separator, *self.text(text, self.config.region_tokens)],
        )

    def _sentence(self, prefix: list[int], rest: list[int]) -> Sentence:
        return Sentence([*prefix, *rest, self.tokenizer.eos_id], len(prefix))

    def rows(self, sentences: Sequence[Sentence | None]) -> Sentences:
        """Put the sentences of B samples together."""
        shape = (len(sentences), self.config.context_length)
        tokens = torch.full(shape, self.tokenizer.pad_id, dtype=torch.int64)
        counted = torch.zeros(shape, dtype=torch.bool)
        for row, sentence in enumerate(sentences):
            if sentence is not None:
                tokens[row, : len(sentence.ids)] = torch.tensor(sentence.ids)
                counted[row, sentence.prefix : len(sentence.ids)] = True
        return Sentences(tokens, counted)

    def prompt(
        self, task: Literal["cap", "arf", "gcap"], given: str | RelativeBox | None = None
    ) -> list[int]:
        """What a sentence begins with: the prefix, and of `arf` the text, of `gcap` the box."""
        prefix = self.prefixes[task]
        if given is None:
            return list(prefix)
        known = self.text(given, self.config.region_tokens) if isinstance(given, str) else self.box(given)
        return [*prefix, *known, *self.separator]
