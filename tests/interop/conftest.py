"""A tokenizer small enough to train for a test session."""

from pathlib import Path

import pytest
import sentencepiece


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters only: pad 0, EOS 1, unknown 2."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "letters"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat", "a blue dog", "the quick fox jumps over my lazy wren"] * 20),
        model_prefix=str(prefix),
        model_type="char",
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")
