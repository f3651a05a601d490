"""Small shards and tokenizers, made at test time."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "a red circle on a grey wall",
    "two blue stars and one square",
    "ein grüner Kreis",
    "три жёлтых круга",
    "0123456789",
]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-fallback unigram model with pad 0, eos 1, unk 2."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=out, vocab_size=320, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(sentencepiece_model: Path) -> Tokenizer:
    """Captions of eight tokens."""
    return load_tokenizer(sentencepiece_model, context_length=8)


@pytest.fixture
def transform() -> ImageTransform:
    """Two by two patches."""
    return ImageTransform(16, 8)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """A cache of this test alone."""
    return str(tmp_path / "cache")


def picture(seed: int = 0, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> Image.Image:
    """Noise, so that no two samples are alike."""
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, {"jpg": "JPEG"}.get(kind, kind))
    return out.getvalue()
