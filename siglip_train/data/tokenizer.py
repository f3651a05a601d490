"""Text to fixed-length token rows; the only place that knows SigLIP's rules for case, EOS and padding."""

import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers
import torch
from torch import Tensor

from siglip_train.errors import UserError

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# the names in use where no tokenizer_config.json stands beside a tokenizer.json
_EOS_NAMES = ("</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "[SEP]")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
# characters of a caption: what comes later is beyond any context, and a text of megabytes would take gigabytes
_READ = 1 << 16
_FOLDER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "*.model")


@dataclass(frozen=True)
class TextRules:
    """What happens to a caption around the tokenizer proper.

    SigLIP 2: lower-case, pad with the pad token. SigLIP 1 (`strip_punctuation=True, pad="eos"`) also strips
    ASCII punctuation, collapses spaces, and pads with EOS.

    lowercase: write all in lower case. strip_punctuation: take ASCII punctuation out, and make one space of several.
    pad: what fills a text up to the context length: the pad token, or EOS again.
    """

    lowercase: bool = True
    strip_punctuation: bool = False
    pad: Literal["pad", "eos"] = "pad"

    def __post_init__(self) -> None:
        if self.pad not in ("pad", "eos"):
            raise UserError(f'pad is {self.pad!r}, but must be "pad" (SigLIP 2) or "eos" (SigLIP)')

    def clean(self, text: str) -> str:
        """Apply case and punctuation rules."""
        if self.lowercase:
            text = text.lower()
        if self.strip_punctuation:
            text = re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()
        return text


class SentencePieceEncoder:
    """A sentencepiece `.model`."""

    def __init__(self, path: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor()
        self.pieces.load_from_serialized_proto(path.read_bytes())
        self.vocab_size = self.pieces.get_piece_size()
        # sentencepiece says -1 for what a model lacks
        self.eos_id = _not_negative(self.pieces.eos_id())
        self.pad_id = _not_negative(self.pieces.pad_id())

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.pieces.encode(text, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return self.pieces.decode(list(ids))


class JsonEncoder:
    """A `tokenizer.json` of the tokenizers library; a tokenizer_config.json beside it names EOS and pad."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        declared = _declared_special_tokens(path.parent)
        padding = self.tokenizer.padding or {}
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.eos_id = self._first_id([declared.get("eos_token"), *_EOS_NAMES])
        self.pad_id = self._first_id([declared.get("pad_token"), padding.get("pad_token"), *_PAD_NAMES])

    def _first_id(self, names: Sequence[str | None]) -> int | None:
        ids = (self.tokenizer.token_to_id(name) for name in names if name)
        return next((index for index in ids if index is not None), None)

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens, even if the text spells one."""
        # set at each use: it does not survive pickling
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _not_negative(index: int) -> int | None:
    return index if index >= 0 else None


def _declared_special_tokens(folder: Path) -> dict[str, str]:
    declared: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in ("eos_token", "pad_token"):
            token = content.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                declared[key] = token
    return declared


class Tokenizer:
    """Captions to `[n, context_length]`: no BOS, EOS at the end, padded; a cut caption keeps EOS at its end.

    Picklable, so that loader workers get a copy.
    """

    def __init__(
        self, encoder: SentencePieceEncoder | JsonEncoder, rules: TextRules, context_length: int, name: str
    ) -> None:
        if encoder.eos_id is None:
            raise UserError(
                f"tokenizer {name} has no end-of-sentence token; SigLIP appends one to every text"
            )
        if rules.pad == "pad" and encoder.pad_id is None:
            raise UserError(
                f'tokenizer {name} has no padding token; set pad="eos" in the text rules or train it with one'
            )
        if context_length < 1:
            raise UserError(f"context_length is {context_length}, but must be at least 1")
        self.encoder = encoder
        self.rules = rules
        self.context_length = context_length
        self.name = name
        self.vocab_size = encoder.vocab_size
        self.eos_id: int = encoder.eos_id
        self.pad_id: int = encoder.eos_id if rules.pad == "eos" else encoder.pad_id  # type: ignore[assignment]

    def encode(self, text: str) -> list[int]:
        """The token ids of a text under the rules, as many as there are, without special tokens."""
        return self.encoder.encode(self.rules.clean(text[:_READ]))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids before the first end or padding."""
        known = [i for i, token in enumerate(ids) if token in (self.eos_id, self.pad_id)]
        return self.encoder.decode(ids[: known[0]] if known else ids).strip()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts to int64 `[n, context_length]`."""
        rows = torch.full((len(texts), self.context_length), self.pad_id, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text)[: self.context_length - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, self.eos_id])
        return rows


def load_tokenizer(path: str | Path, rules: TextRules | None = None, context_length: int = 64) -> Tokenizer:
    """Read a sentencepiece `.model`, a tokenizers `.json`, or a folder that holds one.

    Raises `UserError` where there is none, it cannot be read, or it lacks EOS (or padding, with `pad="pad"`).
    """
    file = _find_file(Path(path).expanduser())
    build: Callable[[Path], Any] = JsonEncoder if file.suffix == ".json" else SentencePieceEncoder
    try:
        encoder = build(file)
    except Exception as error:  # both libraries raise bare Exception or RuntimeError on a foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is not a tokenizer ({reason}); give a sentencepiece .model or a tokenizers .json"
        ) from error
    return Tokenizer(encoder, rules or TextRules(), context_length, str(path))


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"tokenizer {path} does not exist; give a .model file, a .json file or a folder with one"
        )
    for pattern in _FOLDER_FILES:
        matches = sorted(path.glob(pattern))
        if matches:
            return matches[0]
    raise UserError(f"folder {path} holds no tokenizer: none of {', '.join(_FOLDER_FILES)} is there")
