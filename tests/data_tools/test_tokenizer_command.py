"""`siglip-data tokenizer` on shards: the file it writes is what training reads."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data_tools.cli import main
from data_tools.tokenizer.captions import CaptionFields, draw_captions
from siglip_train.data.shards.fields import Field
from siglip_train.data.tokenizer import TextRules, load_tokenizer
from tests.data.shard_files import sample, write_tar

# a second process takes longer to start than the work takes
ONE = ("--workers", "1")


def test_a_tokenizer_of_all_languages(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "new" / "tokenizer.model"
    shards = f"{tiny_data}/validation/*.tar"
    main(["tokenizer", shards, str(model), "--text", "json:captions.*", "--vocab-size", "700", *ONE])
    assert "700 pieces" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(model), TextRules(), 24)
    assert tokenizer.vocab_size == 700
    tokens = tokenizer(["a red circle", "红色的圆形"])
    assert (tokens[:, -1] == tokenizer.pad_id).all(), "short captions fit"
    assert (tokens == tokenizer.eos_id).sum(1).tolist() == [1, 1]


def _pieces(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def test_the_options_of_training_are_those_of_the_model(tiny_data: Path, tmp_path: Path) -> None:
    def train(name: str, *options: str) -> sentencepiece.SentencePieceProcessor:
        shards = f"{tiny_data}/validation/*.tar"
        main(["tokenizer", shards, str(tmp_path / name), "--text", "json:captions", "--vocab-size", "700",
              *ONE, *options])  # fmt: skip
        return _pieces(tmp_path / name)

    captions = draw_captions(
        f"{tiny_data}/validation/*.tar", CaptionFields((Field.parse("json:captions"),)), 0, tmp_path, 1
    )
    letters = sorted({letter for caption in captions.texts for letter in caption.lower()} - {" "})
    plain = train("plain.model", "--character-coverage", "1")
    assert [plain.id_to_piece(piece) for piece in plain.encode("☂")[-3:]] == ["<0xE2>", "<0x98>", "<0x82>"]
    assert not any(plain.is_byte(piece) for letter in letters for piece in plain.encode(letter))
    few = train("few.model", "--character-coverage", "0.98")
    assert any(few.is_byte(piece) for letter in letters for piece in few.encode(letter))
    # the scores of BPE are ranks, those of a unigram model logarithms of probabilities
    unigram = train("unigram.model", "--type", "unigram", "--no-byte-fallback")
    assert all(plain.get_score(piece) % 1 == 0 for piece in range(700))
    assert any(unigram.get_score(piece) % 1 for piece in range(700))
    assert unigram.encode("☂")[-1] == unigram.unk_id() == 2


def test_sentences_are_drawn_alike_in_every_run(tiny_data: Path, tmp_path: Path) -> None:
    fields = CaptionFields((Field.parse("txt"), Field.parse("json:captions")))
    shards = f"{tiny_data}/validation/*.tar"
    every = draw_captions(shards, fields, 0, tmp_path, workers=1).texts
    some = draw_captions(shards, fields, 50, tmp_path, workers=1)
    assert some.texts == draw_captions(shards, fields, 50, tmp_path, workers=1).texts
    assert (len(some.texts), some.found) == (50, len(every))
    places = iter(every)
    assert all(text in places for text in some.texts), "in file order"
    assert set(some.texts) != set(every[:50])


def test_a_model_that_is_there_stays(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "t.model"
    model.write_bytes(b"precious")
    command = ["tokenizer", f"{tiny_data}/validation/*.tar", str(model), "--vocab-size", "600", *ONE]
    with pytest.raises(SystemExit) as leaving:
        main(command)
    assert leaving.value.code == 2
    assert "--force" in capsys.readouterr().err
    assert model.read_bytes() == b"precious"
    main([*command, "--force"])
    assert _pieces(model).get_piece_size() == 600
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


def _words_tokenizer(folder: Path) -> Path:
    """A tokenizers .json that knows two words, and that splits at spaces."""
    names = ["<pad>", "</s>", "<unk>", "a", "cat"]
    model = tokenizers.models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _bytes_tokenizer(folder: Path) -> Path:
    """A sentencepiece model with byte fallback that knows the letters of "a cat" alone."""
    path = folder / "bytes.model"
    with path.open("wb") as sink:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a cat"] * 5), model_writer=sink, vocab_size=264, model_type="bpe", bos_id=-1,
            byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return path


@pytest.fixture
def captions(tmp_path: Path) -> str:
    """Two English captions and one German, in two shards; the third sample is broken."""
    rows = [
        sample("0", txt=b"A cat", json=b'{"language": "en", "captions": {"de": "zz"}}'),
        sample("1", txt=b"a a cat", json=b'{"lang": "en"}'),
        sample("2", txt=b"\xff"),
    ]
    for number, row in enumerate(rows):
        write_tar(tmp_path / "in" / f"{number}.tar", row)
    return str(tmp_path / "in")


def _inspect(shards: str, model: Path, *options: str) -> dict:
    out = model.parent / "out.json"
    main(["tokenizer", shards, str(model), "--inspect", "--json", str(out), *ONE, *options])
    return json.loads(out.read_text())


def test_inspection_of_unknown_words(captions: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fields = ("--text", "txt", "json:captions", "--context-length", "3")
    found = _inspect(captions, _words_tokenizer(tmp_path), *fields)
    assert "left out 1 not utf-8; the first: 2.tar/2" in capsys.readouterr().out
    assert found["vocabulary"] == {"pieces": 5, "used": 3}
    english, german = found["languages"]["en"], found["languages"]["de"]
    assert (english["captions"], english["words"], english["characters"]) == (2, 5, 9)
    assert english["tokens"] == {"mean": 3.5, "p50": 3, "p95": 4, "max": 4}
    assert (english["unknown_share"], english["over_context_length_share"], english["tokens_per_word"]) == (
        0,
        0.5,
        1,
    )
    assert (german["captions"], german["unknown_share"], german["tokens_per_character"]) == (1, 1, 0.5)
    # "c" and "t" alone are no words of the model
    assert german["coverage"] == 0
    assert german["not_covered"] == ["z"]
    assert english["pieces_used"] == 2
    assert found["all"]["captions"] == 3
    assert found["bad"] == {"not utf-8": 1}


def test_inspection_of_bytes(captions: str, tmp_path: Path) -> None:
    found = _inspect(captions, _bytes_tokenizer(tmp_path), "--text", "txt", "json:captions")
    english, german = found["languages"]["en"], found["languages"]["de"]
    assert (english["byte_share"], english["coverage"]) == (0, 1)
    # the mark of a word's begin, then two bytes
    assert german["byte_share"] == pytest.approx(2 / 3)
    assert (german["coverage"], german["not_covered"]) == (0, ["z"])


def test_inspection_does_not_depend_on_workers(tiny_data: Path, tmp_path: Path) -> None:
    model = tmp_path / "t.model"
    shards = f"{tiny_data}/validation/*.tar"
    main(["tokenizer", shards, str(model), "--text", "json:captions", "--vocab-size", "700", *ONE])
    one = _inspect(shards, model, "--text", "json:captions")
    assert one == _inspect(shards, model, "--text", "json:captions", "--workers", "2")
    by_language = {name: row["captions"] for name, row in one["languages"].items()}
    assert len(by_language) == 8
    assert len(set(by_language.values())) == 1
    assert [name for name, row in one["languages"].items() if not row["has_words"]] == ["ja", "zh"]
    assert one["all"]["coverage"] > 0.99
    tokenizer = load_tokenizer(str(model))
    worst = one["languages"]["de"]["worst_words"][0]
    assert worst["pieces"] == len(tokenizer.encoder.encode(worst["word"]))


def test_captions_that_are_longer_than_the_library_likes_are_not_left_out(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", [*sample("a", txt=b"tree " * 2000), *sample("b", txt=b"a house")])
    main(["tokenizer", str(shard), str(tmp_path / "t.model"), "--vocab-size", "270", *ONE])
    pieces = _pieces(tmp_path / "t.model")
    assert not any(pieces.is_byte(piece) for piece in pieces.encode("tree"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/*.tar", "{tmp}/t.model"], "nowhere"),
        (["{data}/validation/*.tar", "{tmp}/t.bin"], "NAME.model"),
        (["{data}/validation/*.tar", "{tmp}/t.model", "--text", "json:nothing"], "no caption"),
        (["{data}/validation/*.tar", "{tmp}/t.model", "--vocab-size", "99999"], "cannot train"),
        (["{data}/validation/*.tar", "{tmp}/t.model", "--vocab-size", "300"], "with --character-coverage"),
        (["{data}/validation/*.tar", "{tmp}/t.model", "--type", "words"], "unigram"),
        (["{data}/validation/*.tar", "{tmp}/t.model", "--character-coverage", "0.5"], "0.98"),
        (
            ["{data}/validation/*.tar", "{tmp}/t.model", "--language", "txt"],
            "--language means nothing without",
        ),
        (["{data}/validation/*.tar", "{tmp}/t.model", "--inspect"], "does not exist"),
        (
            ["{data}/validation/*.tar", "{tmp}/t.model", "--inspect", "--type", "bpe"],
            "--type means nothing with",
        ),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    filled = [argument.format(data=tiny_data, tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as leaving:
        main(["tokenizer", *filled, *ONE])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.model"))
