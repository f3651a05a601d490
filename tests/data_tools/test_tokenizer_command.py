"""`siglip-data tokenizer` on shards: the file it writes is what training reads."""

from pathlib import Path

import pytest

from data_tools.cli import main
from siglip_train.data.tokenizer import TextRules, load_tokenizer


def test_a_tokenizer_of_all_languages(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "new" / "tokenizer.model"
    shards = f"{tiny_data}/validation/*.tar"
    main(["tokenizer", shards, str(model), "--text", "json:captions.*", "--vocab-size", "700"])
    assert "700 pieces" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(model), TextRules(), 24)
    assert tokenizer.vocab_size == 700
    tokens = tokenizer(["a red circle", "红色的圆形"])
    assert (tokens[:, -1] == tokenizer.pad_id).all(), "short captions fit"
    assert (tokens == tokenizer.eos_id).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/*.tar", "{tmp}/t.model"], "nowhere"),
        (["{data}/validation/*.tar", "{tmp}/t.bin"], "NAME.model"),
        (["{data}/validation/*.tar", "{tmp}/t.model", "--text", "json:nothing"], "no caption"),
        (["{data}/validation/*.tar", "{tmp}/t.model", "--vocab-size", "99999"], "cannot train"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    filled = [argument.format(data=tiny_data, tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as leaving:
        main(["tokenizer", *filled])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.model"))
