"""Train a sentencepiece tokenizer in the form siglip_train reads: pad 0, end 1, unknown 2, no beginning."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.files.atomic import appearing

# bytes of a caption; the library leaves longer ones out without a word, its own limit being 4,192
_LONGEST = 1 << 24


@dataclass(frozen=True)
class TrainingOptions:
    """What a tokenizer is to be.

    vocab_size: pieces. model_type: bpe, or unigram, which trains longer and splits long captions into more tokens.
    character_coverage: share of the captions' characters that become pieces of their own. byte_fallback: other
    characters become the bytes of their UTF-8; without it, they are unknown. symbols: characters that are pieces of
    their own whatever the captions hold, and never parts of longer ones; also at the beginning of a word.
    """

    vocab_size: int = 8192
    # at 1,024 pieces the longest caption of make-tiny takes 22 tokens; with a unigram model, 41
    model_type: Literal["bpe", "unigram"] = "bpe"
    character_coverage: float = 0.9995
    byte_fallback: bool = True
    symbols: str = ""


def train_tokenizer(captions: Iterable[str], path: Path, options: TrainingOptions) -> None:
    """Train a model on the captions, lower-cased as in training, and write it to `path` (`.model`).

    Text is taken as it is (no Unicode normalisation), so decoding gives the lower-cased caption back.
    Raises UserError when the captions cannot fill, or do not fit, the vocabulary; a file at `path` is replaced.
    """
    clean = TextRules().clean
    try:
        with appearing(path) as partial, partial.open("wb") as sink:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(clean(caption) for caption in captions),
                model_writer=sink,
                vocab_size=options.vocab_size,
                model_type=options.model_type,
                character_coverage=options.character_coverage,
                byte_fallback=options.byte_fallback,
                user_defined_symbols=[*(f"▁{symbol}" for symbol in options.symbols), *options.symbols],
                max_sentence_length=_LONGEST,
                normalization_rule_name="identity",
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                num_threads=1,  # the sums of several threads depend on their number
                minloglevel=2,
            )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1] or "the captions do not fit"
        # as the option is called here
        reason = reason.replace("--character_coverage", "--character-coverage")
        raise UserError(f"cannot train a tokenizer of {options.vocab_size} pieces: {reason}") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
