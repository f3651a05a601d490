"""What is counted of captions as a tokenizer cuts them: a `Tally` for each language, merged shard by shard."""

import functools
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.stats.counters import BadSamples, Distribution, Frequent
from data_tools.tokenizer.captions import CaptionFields, shard_captions
from siglip_train.data.tokenizer import SentencePieceEncoder, TextRules, Tokenizer, load_tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# of a word that is kept to be listed
_WORD_CHARACTERS = 300


class Vocabulary:
    """A tokenizer as training uses it, and which of its pieces stand for a byte or for what it does not know."""

    def __init__(self, path: str, context_length: int = 64) -> None:
        # nothing is padded here, so a tokenizer without a padding token will do
        self.tokenizer: Tokenizer = load_tokenizer(path, TextRules(pad="eos"), context_length)
        encoder = self.tokenizer.encoder
        size = encoder.vocab_size
        if isinstance(encoder, SentencePieceEncoder):
            names = [encoder.pieces.id_to_piece(piece) for piece in range(size)]
            unknown = encoder.pieces.unk_id()
        else:
            names = [encoder.tokenizer.id_to_token(piece) or "" for piece in range(size)]
            model = json.loads(encoder.tokenizer.to_str())["model"]
            # a unigram model has its number, the others its name
            unknown = model.get("unk_id", encoder.tokenizer.token_to_id(model.get("unk_token") or ""))
        self.is_byte = np.array([bool(_BYTE.fullmatch(name)) for name in names], dtype=bool)
        self.is_unknown = np.arange(size) == (-1 if unknown is None else unknown)

    @property
    def size(self) -> int:
        """Pieces in all."""
        return len(self.is_byte)

    def clean(self, text: str) -> str:
        """The text as training hands it to the tokenizer: lower-cased."""
        return self.tokenizer.rules.clean(text)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Piece ids of a clean text, without the end."""
        return np.array(self.tokenizer.encoder.encode(text), dtype=np.int64)

    def covers(self, character: str) -> bool:
        """Is there a piece for it, so that neither bytes nor the unknown piece have to stand in?"""
        ids = self.encode(character)
        return not (self.is_byte[ids] | self.is_unknown[ids]).any()


@dataclass
class Tally:
    """Counts of the captions of one language.

    tokens: of each caption with its end, as a context length counts. pieces: tokens without ends, and of those as bytes
    or unknown. words: what stands between spaces. characters: spaces left out. used: how often each piece occurs.
    """

    captions: int = 0
    tokens: Distribution = field(default_factory=Distribution)
    too_long: int = 0
    pieces: int = 0
    as_bytes: int = 0
    unknown: int = 0
    word_count: int = 0
    words: Frequent = field(default_factory=Frequent)
    characters: Counter[str] = field(default_factory=Counter)
    used: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def add(self, text: str, vocabulary: Vocabulary) -> None:
        """Count one caption."""
        text = vocabulary.clean(text)
        ids = vocabulary.encode(text)
        if not len(self.used):
            self.used = np.zeros(vocabulary.size, dtype=np.int64)
        np.add.at(self.used, ids, 1)
        self.captions += 1
        self.tokens.add(len(ids) + 1)
        self.too_long += len(ids) + 1 > vocabulary.tokenizer.context_length
        self.pieces += len(ids)
        self.as_bytes += int(vocabulary.is_byte[ids].sum())
        self.unknown += int(vocabulary.is_unknown[ids].sum())
        for word in text.split():
            self.word_count += 1
            self.words.add(word[:_WORD_CHARACTERS])
            self.characters.update(word)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another."""
        for name in ("captions", "too_long", "pieces", "as_bytes", "unknown", "word_count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.tokens.merge(other.tokens)
        self.words.merge(other.words)
        self.characters.update(other.characters)
        if len(other.used):
            self.used = self.used + other.used if len(self.used) else other.used


class InspectTask(NamedTuple):
    """One shard, where downloads are, and the tokenizer to cut its captions with."""

    url: str
    cache: Path
    fields: CaptionFields
    tokenizer: str
    context_length: int


def inspect_shard(task: InspectTask) -> tuple[dict[str, Tally], BadSamples]:
    """Count one shard: language -> tally."""
    vocabulary, bad = _vocabulary(task.tokenizer, task.context_length), BadSamples()
    tallies: dict[str, Tally] = {}
    for caption in shard_captions(task.url, task.fields, task.cache, bad):
        tallies.setdefault(caption.language, Tally()).add(caption.text, vocabulary)
    return tallies, bad


# one process has many shards and one tokenizer
@functools.lru_cache(1)
def _vocabulary(path: str, context_length: int) -> Vocabulary:
    return Vocabulary(path, context_length)
