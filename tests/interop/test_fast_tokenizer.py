"""The written tokenizer.json gives the very tokens of training: any sentencepiece model, any rules."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch

from siglip_train.data.tokenizer import TextRules, load_tokenizer
from siglip_train.errors import UserError
from siglip_train.interop.fast_tokenizer import write_fast_tokenizer

TEXTS = [
    "a red cat",
    "A Blue  DOG, the quick fox!",
    "  spaced   out \t tab ",
    "",
    "красный круг слева",
    "赤い丸が青い四角の上",
    "أحمر दायرة लाल",
    "Ünïcödé ﬁ ① ½",
    "jumps over my lazy wren " * 10,
    "snake_case-word (x) [y] {z}",
    "a\nb",
    "a <x> b<X>",
    "ΑΣ ΣΑΣ, İstanbul",
]
RULES = [TextRules(), TextRules(strip_punctuation=True, pad="eos"), TextRules(lowercase=False)]
LENGTH = 24


def train(folder: Path, **options: object) -> Path:
    settings = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["<x>"],
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "minloglevel": 2,
        **options,
    }
    lines = [text for text in TEXTS if text.strip()] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "m"), **settings
    )
    return folder / "m.model"


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "byte_fallback": True, "vocab_size": 346},
        # Gemma's way: spaces are kept, and none is put in front
        {
            "model_type": "bpe",
            "byte_fallback": True,
            "vocab_size": 346,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
        },
        {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "unigram"},
        {"model_type": "char", "normalization_rule_name": "nmt_nfkc"},
    ],
)
def test_tokens_equal_sentencepieces(tmp_path: Path, options: dict, rules: TextRules) -> None:
    ours = load_tokenizer(train(tmp_path, **options), rules, LENGTH)
    (tmp_path / "out").mkdir()
    write_fast_tokenizer(ours, tmp_path / "out")
    # the file alone, without our rules around it
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    theirs.encode_special_tokens = True
    expected = ours(TEXTS)
    for text, row in zip(TEXTS, expected, strict=True):
        assert theirs.encode(text).ids == row.tolist(), text
    assert torch.equal(load_tokenizer(tmp_path / "out", rules, LENGTH)(TEXTS), expected)
    content = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert content["model_input_names"] == ["input_ids"]


def test_a_tokenizer_json_is_written_again_with_the_rules_in_it(tmp_path: Path) -> None:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "cat": 4}
    source = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    source.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    source.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json", TextRules(strip_punctuation=True), 6)
    (tmp_path / "out").mkdir()
    write_fast_tokenizer(ours, tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert theirs.encode("A c.at!").ids == [3, 4, 1, 0, 0, 0] == ours(["A c.at!"])[0].tolist()
    long = "a cat " * 5
    assert theirs.encode(long).ids == [3, 4, 3, 4, 3, 1] == ours([long])[0].tolist()


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"model_type": "word", "user_defined_symbols": []}, "splits into words"),
        ({"model_type": "unigram", "treat_whitespace_as_suffix": True}, "writes spaces behind words"),
    ):
        tokenizer = load_tokenizer(train(tmp_path, **options), TextRules(), LENGTH)
        with pytest.raises(UserError, match=message):
            write_fast_tokenizer(tokenizer, tmp_path)
