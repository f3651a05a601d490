"""The export folder: bit-equal round trip, safe replacement, and clear refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from siglip_train.data.tokenizer import TextRules, load_tokenizer
from siglip_train.errors import UserError
from siglip_train.interop.native import Description, is_native, read_export, write_export
from tests.models.small import small_config, small_model


def edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    write_export(folder, small_model().state_dict(), Description(small_config()))
    return folder


@pytest.mark.parametrize("pool", ["map", "cls", "average"])
def test_round_trip_is_bit_equal(tmp_path: Path, sentencepiece_model: Path, pool: str) -> None:
    model = small_model(pool=pool, gelu="erf", position_grid=3)
    rules = TextRules(strip_punctuation=True, pad="eos")
    description = Description(model.config, tokenizer=sentencepiece_model, rules=rules, resize="bicubic")
    write_export(tmp_path / "export", model.state_dict(), description)
    files = read_export(tmp_path / "export")
    assert files.description.config == model.config
    assert (files.description.rules, files.description.resize) == (rules, "bicubic")
    state = model.state_dict()
    assert files.state.keys() == state.keys()
    assert all(torch.equal(files.state[name], state[name]) for name in state)
    assert files.description.tokenizer.read_bytes() == sentencepiece_model.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_an_export_can_be_exported_again(tmp_path: Path, sentencepiece_model: Path) -> None:
    state = small_model().state_dict()
    write_export(tmp_path / "a", state, Description(small_config(), tokenizer=sentencepiece_model))
    write_export(tmp_path / "b", state, read_export(tmp_path / "a").description)
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_tokenizer_folder_travels_with_the_names_of_its_special_tokens(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    source = tmp_path / "source"
    source.mkdir()
    vocabulary = {"[UNK]": 0, "fin": 1, "vide": 2, "cat": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "fin", "pad_token": "vide"}))
    (source / "notes.txt").write_text("stays behind")
    for given in (source, source / "tokenizer.json"):
        folder = tmp_path / f"export_{given.name}"
        write_export(folder, small_model().state_dict(), Description(small_config(), tokenizer=given))
        tokenize = load_tokenizer(read_export(folder).description.tokenizer, TextRules(), 4)
        assert tokenize(["Cat"]).tolist() == [[3, 1, 2, 2]]
        assert not (folder / "notes.txt").exists()


def test_an_older_export_is_replaced(folder: Path) -> None:
    state = {name: tensor + 1 for name, tensor in small_model().state_dict().items()}
    write_export(folder, state, Description(small_config()))
    assert torch.equal(read_export(folder).state["logit_bias"], torch.tensor([-9.0]))
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="thesis exists and is not an export"):
        write_export(tmp_path / "thesis", small_model().state_dict(), Description(small_config()))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert not is_native(tmp_path / "thesis")


def test_what_was_left_by_a_killed_writer_is_no_obstacle(folder: Path) -> None:
    partial = folder.with_name(".export.partial")
    partial.mkdir()
    (partial / "model.safetensors").write_text("half")
    write_export(folder, small_model().state_dict(), Description(small_config()))
    assert not partial.exists()
    read_export(folder)


def test_another_version_is_refused(folder: Path) -> None:
    edit(folder, version=2)
    with pytest.raises(UserError, match="version 2"):
        read_export(folder)


def test_unknown_and_missing_keys_are_named(folder: Path) -> None:
    model = json.loads((folder / "config.json").read_text())["model"]
    edit(folder, model={**model, "vision": {**model["vision"], "registers": 4}})
    with pytest.raises(UserError, match="registers"):
        read_export(folder)
    edit(folder, model={"vision": model["vision"]})
    with pytest.raises(UserError, match=r"config\.json lacks model\.text"):
        read_export(folder)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vision", "gelu", "relu", r"model\.vision\.gelu: 'relu' is not one of 'tanh', 'erf'"),
        ("vision", "width", "a", r"model\.vision\.width: expected int, got 'a'"),
        ("text", "depth", 0, "model.text: depth must be at least 1, got 0"),
        ("image", "resize", "lanczos", r"image\.resize: 'lanczos' is not one of"),
        ("tokenizer", "lowercase", "no", r"tokenizer\.lowercase: expected bool, got 'no'"),
        ("tokenizer", "stemming", True, r"tokenizer\.stemming: no such key"),
        ("tokenizer", "file", 3, r"tokenizer\.file: expected str, got 3"),
    ],
)
def test_a_value_that_cannot_be_is_named(
    folder: Path, part: str, key: str, value: object, message: str
) -> None:
    content = json.loads((folder / "config.json").read_text())
    (content["model"][part] if part in content["model"] else content[part])[key] = value
    edit(folder, **content)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        read_export(folder)


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["logit_scales"] = tensors.pop("logit_scale")
    tensors["logit_bias"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    expected = "missing: logit_scale; unexpected: logit_scales; misshapen: logit_bias"
    with pytest.raises(UserError, match=expected):
        read_export(folder)
