"""Train a sentencepiece tokenizer in the form siglip_train reads: pad 0, end 1, unknown 2, no beginning."""

import os
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from siglip_train.errors import UserError


def train_tokenizer(captions: Iterable[str], path: Path, vocab_size: int) -> None:
    """Train a BPE model on the lower-cased captions and write it to `path` (`.model`).

    Text is taken as it is (no Unicode normalisation), so decoding gives the lower-cased caption back.
    Raises UserError when the captions cannot fill, or do not fit, the vocabulary.
    """
    partial = path.with_suffix(".partial")
    with partial.open("wb") as sink:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(caption.lower() for caption in captions),
                model_writer=sink,
                vocab_size=vocab_size,
                # at 1,024 pieces the longest caption takes 22 tokens; with a unigram model, 41
                model_type="bpe",
                byte_fallback=True,
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
            raise UserError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from error
    os.replace(partial, path)
