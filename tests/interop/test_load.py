"""`load_model` opens every format; `load_weights` starts a model from another and accounts for each tensor."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import siglip_train
from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.files.manifest import sealing
from siglip_train.interop.load import load_model, load_weights, read_description, read_model
from siglip_train.interop.native import Description, write_export
from siglip_train.models.positions import resize_position_table
from siglip_train.models.siglip import Siglip
from tests.goldens import arrays, golden_folder
from tests.interop.flax_layout import flax_arrays
from tests.models.small import CONTEXT, small_config, small_model, some_pixels, some_tokens


@pytest.fixture
def run_dir(tmp_path: Path, sentencepiece_model: Path) -> Path:
    """A run with two checkpoints, the newer one with logit_bias 0; its vocabulary fits the tokenizer."""
    config = small_config()
    config.text.vocab_size = 40
    torch.manual_seed(0)
    model = Siglip(config)
    run = tmp_path / "run"
    for step in (10, 20):
        weights = run / "checkpoints" / f"step-{step:08d}" / "weights"
        write_export(weights, model.state_dict(), Description(config, tokenizer=sentencepiece_model))
        torch.nn.init.zeros_(model.logit_bias)
    (run / "checkpoints" / "LAST").write_text("step-00000020\n")
    return run


def test_a_run_opens_at_its_newest_checkpoint(run_dir: Path) -> None:
    assert load_model(run_dir).model.logit_bias.item() == 0
    assert load_model(run_dir / "checkpoints").model.logit_bias.item() == 0
    older = run_dir / "checkpoints" / "step-00000010"
    assert load_model(older).model.logit_bias.item() == -10
    assert load_model(str(older / "weights")).model.logit_bias.item() == -10


def test_a_loaded_model_takes_pictures_and_texts(run_dir: Path) -> None:
    loaded = siglip_train.load_model(run_dir)
    assert not loaded.model.training
    picture = Image.new("RGBA", (50, 31), (200, 30, 30, 128))
    images = loaded.preprocess(picture)
    assert images.patches.dtype == torch.uint8
    assert images.patches.shape == (1, 16, 48)
    tokens = loaded.tokenize(["a cat", "THE dog"])
    assert tokens.shape == (2, CONTEXT)
    assert torch.equal(loaded.tokenize(["the dog"])[0], tokens[1])
    image, text = loaded.model.encode_image(images), loaded.model.encode_text(tokens)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(1))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))


def test_a_huggingface_folder_opens_without_tokenizer_but_cannot_tokenize(sentencepiece_model: Path) -> None:
    folder = golden_folder("hf_siglip_b8_i32")
    loaded = load_model(folder)
    inputs, expected = (arrays("hf_siglip_b8_i32", file) for file in ("inputs.npz", "expected_f32.npz"))
    with torch.no_grad():
        image = loaded.model.encode_image(torch.from_numpy(inputs["pixel_values"]))
    torch.testing.assert_close(image, torch.from_numpy(expected["full/image_embeds"]), rtol=0, atol=2e-6)
    with pytest.raises(UserError, match=r"hf_siglip_b8_i32 has no tokenizer: give one with tokenizer=PATH"):
        loaded.tokenize(["a cat"])
    given = load_model(folder, tokenizer=sentencepiece_model)
    tokens = given.tokenize(["a cat!"])
    assert tokens.shape == (1, 16)
    # SigLIP 1 rules: no punctuation, padded with EOS
    assert torch.equal(tokens, given.tokenize(["A cat"]))
    assert tokens[0, -1] == 1


def test_a_tokenizer_in_a_huggingface_folder_is_found(tmp_path: Path, sentencepiece_model: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(golden_folder("hf_siglip_b8_i32"), folder)
    shutil.copy(sentencepiece_model, folder / "spiece.model")
    assert load_model(folder).tokenize(["a cat"]).shape == (1, 16)


def test_a_foreign_tokenizer_is_told(tmp_path: Path, sentencepiece_model: Path) -> None:
    write_export(tmp_path / "x", small_model().state_dict(), Description(small_config(), sentencepiece_model))
    with pytest.raises(UserError, match="not its tokenizer"):
        load_model(tmp_path / "x").tokenize(list("abcdefghilnorstu"))


def test_an_open_clip_path_is_recognised(tmp_path: Path) -> None:
    source = golden_folder("open_clip_b8_i32")
    shutil.copy(source / "tiny-SigLIP.json", tmp_path / "open_clip_config.json")
    shutil.copy(source / "open_clip_model.safetensors", tmp_path)
    for path in (tmp_path, tmp_path / "open_clip_model.safetensors", source / "tiny-SigLIP.json"):
        # its timm name is invented: reading got as far as open_clip's own config
        with pytest.raises(UserError, match="vit_tiny64_patch8_siglip_32"):
            load_model(path)


def test_a_file_of_weights_stands_for_its_folder(run_dir: Path, tmp_path: Path) -> None:
    weights = run_dir / "checkpoints" / "step-00000010" / "weights" / "model.safetensors"
    assert load_model(weights).model.logit_bias.item() == -10
    load_model(golden_folder("hf_siglip_b8_i32") / "model.safetensors")
    for name, config in (
        ("model.safetensors", "config.json"),
        ("open_clip_model.safetensors", "open_clip_config.json"),
    ):
        shutil.copy(weights, tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} holds weights alone: {config}, .* is not beside it"):
            load_model(tmp_path / name)


def test_a_model_is_described_without_its_weights_as_with_them(run_dir: Path, tmp_path: Path) -> None:
    paths = [run_dir, golden_folder("hf_siglip_b8_i32"), golden_folder("hf_siglip2_nf_p8_g4")]
    model = small_model()
    np.savez(tmp_path / "model.npz", **flax_arrays(model))
    for path in (*paths, tmp_path / "model.npz"):
        assert read_description(path) == read_model(path).description, path


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no model: neither a run"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type bert"):
        load_model(tmp_path)


def test_a_pointer_to_nothing_is_told(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-00000020")
    assert load_model(run_dir).model.logit_bias.item() != 0
    assert "LAST names no checkpoint that is there: step-00000010 is taken" in caplog.text
    shutil.rmtree(run_dir / "checkpoints" / "step-00000010")
    with pytest.raises(UserError, match=r"LAST names step-00000020, which is not there"):
        load_model(run_dir)


def test_damaged_weights_are_not_used(run_dir: Path) -> None:
    damaged = "weights/model.safetensors"
    checkpoint = run_dir / "checkpoints" / "step-00000020"
    with sealing(checkpoint) as seal:
        seal.add(checkpoint / "weights")
    assert load_model(run_dir).model.logit_bias.item() == 0
    content = (checkpoint / damaged).read_bytes()
    (checkpoint / damaged).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for path in (run_dir, checkpoint, checkpoint / "weights"):
        with pytest.raises(UserError, match=f"is damaged: {damaged} is not as it was written"):
            load_model(path)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    write_export(tmp_path / "export", small_model().state_dict(), Description(small_config()))
    return tmp_path / "export"


def test_weights_of_the_same_model_load_whole(export: Path) -> None:
    torch.manual_seed(9)
    model = Siglip(small_config())
    report = load_weights(model, export)
    assert sorted(report.loaded) == sorted(model.state_dict())
    assert report.resampled == report.fresh == report.unused == []
    torch.testing.assert_close(model.encode_text(some_tokens()), small_model().encode_text(some_tokens()))
    torch.testing.assert_close(model.encode_image(some_pixels()), small_model().encode_image(some_pixels()))


def test_another_resolution_resamples_the_positions_and_says_so(export: Path) -> None:
    model = small_model(image_size=24)
    report = load_weights(model, export)
    expected = resize_position_table(small_model().vision.position_table, 6)
    assert torch.equal(model.vision.position_table, expected)
    assert report.resampled == ["vision.position_table"]
    assert str(report) == f"{len(model.state_dict()) - 1} tensors loaded, 1 resampled (vision.position_table)"
    untouched = small_model(image_size=24)
    before = {name: tensor.clone() for name, tensor in untouched.state_dict().items()}
    with pytest.raises(UserError, match=r"vision.position_table \(\[16, 24\] instead of \[36, 24\]\)"):
        load_weights(untouched, export, resample=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in untouched.state_dict().items())


def test_another_vocabulary_is_an_error_unless_allowed_to_be_fresh(export: Path) -> None:
    config = small_config()
    config.text.vocab_size = 33
    model = Siglip(config)
    with pytest.raises(UserError, match=r"text.token_embedding.weight \(\[19, 16\] instead of \[33, 16\]\)"):
        load_weights(model, export)
    before = model.text.token_embedding.weight.clone()
    report = load_weights(model, export, fresh=["text.token_embedding"])
    assert report.fresh == ["text.token_embedding.weight"]
    assert torch.equal(model.text.token_embedding.weight, before)
    assert torch.equal(model.text.head.weight, small_model().text.head.weight)


def test_a_tower_that_is_skipped_keeps_its_own_values_and_may_be_another(export: Path) -> None:
    config = small_config()
    config.text.heads, config.text.vocab_size = 1, 33
    model = Siglip(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, export, skip=["text.", "logit_"])
    skipped = {name for name in before if name.startswith(("text.", "logit_"))}
    assert set(report.fresh) == skipped
    assert set(report.loaded) == before.keys() - skipped
    after, start = model.state_dict(), small_model().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in skipped)
    assert all(torch.equal(after[name], start[name]) for name in report.loaded)
    with pytest.raises(UserError, match="no parameter of the model begins with 'txt'"):
        load_weights(model, export, skip=["text.", "txt"])


def test_what_is_skipped_may_be_missing_or_left_over_in_every_format(export: Path, tmp_path: Path) -> None:
    """By our name where the model has it, by the file's own where it has not."""
    content = flax_arrays(small_model())
    hf = shutil.copytree(golden_folder("hf_siglip_b8_i32"), tmp_path / "hf")
    content["params/classifier/kernel"] = content.pop("params/img/MAPHead_0/probe")
    np.savez(tmp_path / "arrays.npz", **content)
    for folder, probe in ((hf, "vision_model.head.probe"), (export, "vision.pool.probe")):
        tensors = load_file(folder / "model.safetensors")
        tensors["classifier.weight"] = tensors.pop(probe)
        save_file(tensors, folder / "model.safetensors")
    for path, config in (
        (hf, load_model(golden_folder("hf_siglip_b8_i32")).model.config),
        (export, small_config()),
        (tmp_path / "arrays.npz", small_config()),
    ):
        model = Siglip(config)
        for skip, message in (
            ([], "missing: .*probe; unexpected"),
            (["vision.pool."], "unexpected: classifier"),
        ):
            with pytest.raises(UserError, match=message):
                load_weights(model, path, skip=skip)
        before = model.vision.pool.probe.clone()
        report = load_weights(model, path, skip=["vision.pool.", "classifier"])
        assert torch.equal(model.vision.pool.probe, before)
        assert "vision.pool.probe" in report.fresh
        assert [name for name in report.unused if name.startswith("classifier")]


def test_missing_and_left_over_tensors_are_named(export: Path) -> None:
    with pytest.raises(UserError, match=r"vision.cls_token \(missing\)"):
        load_weights(small_model(pool="cls"), export)
    report = load_weights(small_model(pool="average"), export)
    assert report.unused
    assert all(name.startswith("vision.pool.") for name in report.unused)


@pytest.mark.parametrize(("key", "value"), [("heads", 4), ("gelu", "erf")])
def test_weights_that_would_mean_something_else_are_refused(export: Path, key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"vision\.{key} .*set model\.vision\.{key}="):
        load_weights(small_model(**{key: value}), export)


def train_characters(folder: Path, alphabet: str) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([alphabet] * 20), model_prefix=str(folder / alphabet), model_type="char",
        vocab_size=19, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / f"{alphabet}.model"


def test_a_model_is_fed_as_it_was_or_the_difference_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = (train_characters(tmp_path, alphabet) for alphabet in ("aabbccddot", "ttooddccba"))
    config, state = small_config(), small_model().state_dict()
    rules = TextRules(strip_punctuation=True, pad="eos")
    write_export(tmp_path / "x", state, Description(config, own, rules, resize="bicubic"))

    def load(skip: list[str] = [], **given: Any) -> None:  # noqa: B006
        inputs = Description(config, **{"tokenizer": own, "rules": rules, "resize": "bicubic", **given})
        load_weights(Siglip(config), tmp_path / "x", skip=skip, inputs=inputs)

    load()
    assert caplog.messages == []
    load(resize="bilinear", skip=["vision."])
    assert caplog.messages == []
    load(resize="bilinear")
    (message,) = caplog.messages
    assert message.endswith("the bicubic filter there, with the bilinear one here: data.resize=bicubic")
    with pytest.raises(
        UserError, match=r"set text_rules\.strip_punctuation=true text_rules\.pad=eos, or leave"
    ):
        load(rules=TextRules())
    with pytest.raises(UserError, match=r"set text_rules\.lowercase=true, or leave"):
        load(rules=replace(rules, lowercase=False))
    with pytest.raises(
        UserError,
        match=rf"'a photo of a cat' becomes other tokens .*set tokenizer={tmp_path}/x/tokenizer.model",
    ):
        load(tokenizer=other)
    load(rules=TextRules(), tokenizer=other, skip=["text."])
    copy = shutil.copy(own, tmp_path / "copy.model")
    load(tokenizer=copy)


def test_a_huggingface_model_can_be_the_start(tmp_path: Path) -> None:
    name = "hf_siglip_b8_i32"
    config = load_model(golden_folder(name)).model.config
    config.vision.image_size = 48
    model = Siglip(config)
    report = load_weights(model, golden_folder(name))
    assert report.resampled == ["vision.position_table"]
    assert report.fresh == report.unused == []
