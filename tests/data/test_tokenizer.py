"""EOS, padding, case, file kinds."""

import json
import pickle
import string
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from siglip_train.data.tokenizer import TextRules, Tokenizer, load_tokenizer
from siglip_train.errors import UserError

GOLDENS = Path(__file__).resolve().parents[2].parent / "shared" / "goldens"
V1 = TextRules(strip_punctuation=True, pad="eos")


class _Numbers:
    """An encoder whose text already is its ids."""

    vocab_size, eos_id, pad_id = 100, 1, 0

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


@pytest.mark.skipif(not GOLDENS.exists(), reason="../shared/goldens is not here")
@pytest.mark.parametrize(("pad", "column"), [("pad", "sticky_pad0"), ("eos", "sticky_pad1")])
def test_eos_and_padding_equal_big_vision(pad: str, column: str):
    golden = np.load(GOLDENS / "bv_sticky_eos" / "expected.npz")
    # a row of n tokens, EOS included, is 10, 11, ... and then EOS
    texts = [" ".join(map(str, range(10, 9 + n))) for n in golden["n_tokens_including_eos"]]
    got = Tokenizer(_Numbers(), TextRules(pad=pad), 8, "numbers")(texts)
    np.testing.assert_array_equal(got.numpy(), golden[column])


def test_rows_are_the_pieces_then_eos_then_pad(sentencepiece_model: Path):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokens = load_tokenizer(sentencepiece_model, context_length=16)(["A Red circle"])
    ids = pieces.encode("a red circle")
    assert tokens.tolist() == [[*ids, 1] + [0] * (15 - len(ids))]


def test_ids_equal_the_slow_huggingface_siglip_tokenizer(sentencepiece_model: Path):
    transformers = pytest.importorskip("transformers")
    slow = transformers.SiglipTokenizer(str(sentencepiece_model), pad_token="</s>", model_max_length=12)
    ours = load_tokenizer(sentencepiece_model, V1, context_length=12)
    texts = [
        "A red circle!",
        "  two, blue -- stars ",
        "Ein Grüner Kreis",
        "три круга",
        "",
        "'hello' you" * 4,
    ]
    expected = slow(texts, padding="max_length", truncation=True, max_length=12)["input_ids"]
    assert ours(texts).tolist() == expected


def test_lower_case_and_punctuation_rules():
    assert TextRules().clean("A  Dog!") == "a  dog!"
    assert V1.clean("  A \n Dog" + string.punctuation) == "a dog"
    assert TextRules(lowercase=False).clean("A Dog") == "A Dog"


def test_no_text_is_no_row(tokenizer: Tokenizer):
    assert tokenizer([]).shape == (0, 8)
    assert tokenizer([""]).tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]


def test_a_copy_in_another_process_gives_the_same(tokenizer: Tokenizer):
    texts = ["a red circle", "три круга"]
    assert pickle.loads(pickle.dumps(tokenizer))(texts).equal(tokenizer(texts))


@pytest.fixture
def json_tokenizer(tmp_path: Path) -> Path:
    """A word-level tokenizer.json that itself truncates and pads, in a folder of its own."""
    words = ["<pad>", "</s>", "<unk>", "a", "cat"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.enable_padding(length=5)
    made.enable_truncation(2)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizers_json_and_its_folder(json_tokenizer: Path):
    for path in (json_tokenizer, json_tokenizer.parent):
        loaded = load_tokenizer(path, context_length=6)
        assert loaded(["A cat a", "a a a a a a a"]).tolist() == [[3, 4, 3, 1, 0, 0], [3, 3, 3, 3, 3, 1]]
        assert (loaded.vocab_size, loaded.eos_id, loaded.pad_id) == (5, 1, 0)


def test_a_caption_cannot_spell_a_special_token(json_tokenizer: Path):
    loaded = load_tokenizer(json_tokenizer, context_length=4)
    for each in (loaded, pickle.loads(pickle.dumps(loaded))):
        assert each(["cat</s>"]).tolist() == [[2, 1, 0, 0]]


def test_tokenizer_config_names_eos_and_pad(json_tokenizer: Path):
    config = {"eos_token": {"content": "cat"}, "pad_token": "a"}
    (json_tokenizer.parent / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(json_tokenizer, context_length=3)
    assert (loaded.eos_id, loaded.pad_id) == (4, 3)


def test_folder_with_a_sentencepiece_model(sentencepiece_model: Path, tmp_path: Path):
    (tmp_path / "any.model").write_bytes(sentencepiece_model.read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == load_tokenizer(sentencepiece_model).vocab_size


def _word_level(path: Path, words: list[str]) -> Path:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)})).save(
        str(path)
    )
    return path


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    for name in ("bad.model", "bad.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="is not a tokenizer"):
            load_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="no end-of-sentence token"):
        load_tokenizer(_word_level(tmp_path / "a.json", ["a", "<pad>"]))
    no_pad = _word_level(tmp_path / "b.json", ["a", "</s>"])
    with pytest.raises(UserError, match="no padding token"):
        load_tokenizer(no_pad)
    assert load_tokenizer(no_pad, TextRules(pad="eos")).pad_id == 1
    with pytest.raises(UserError, match="pad is"):
        TextRules(pad="left")
