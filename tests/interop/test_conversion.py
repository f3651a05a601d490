"""`siglip-convert`: bit-equal round trips, peers that agree in a process of their own, and mistakes in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_tools.tokenizer.train import TrainingOptions, train_tokenizer
from siglip_train import convert as command
from siglip_train.errors import UserError
from siglip_train.interop import conversion, probe
from siglip_train.interop.conversion import Request, convert
from siglip_train.interop.load import load_model, read_model
from siglip_train.interop.native import Description, write_export
from siglip_train.interop.usage import usage
from siglip_train.models.positions import resize_position_table
from siglip_train.models.siglip import Siglip
from siglip_train.models.vision import patchify
from tests.goldens import golden_folder
from tests.interop.flax_layout import flax_arrays
from tests.interop.test_usage import code_of, near, write_image
from tests.models.small import padded, rectangle, small_config
from tests.tiers import one_in

CAPTIONS = ["a red circle", "two blue stars left of a dog", "ein grüner Kreis", "一只猫", "A QUIET, morning!"]
VOCABULARY = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `siglip-data tokenizer` trains it."""
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    train_tokenizer((CAPTIONS + list(probe.TEXTS)) * 20, path, TrainingOptions(VOCABULARY))
    return path


def build(
    *, naflex: bool = False, gelu: str = "tanh", projection: bool = True, bottleneck: int | None = None
) -> Siglip:
    config = small_config(position_grid=4 if naflex else None, gelu=gelu)
    config.text.vocab_size, config.text.context_length = VOCABULARY, 12
    config.text.bottleneck = bottleneck
    if not projection:
        config.text.width, config.text.heads, config.text.projection = 24, 3, False
    torch.manual_seed(1)
    model = Siglip(config)
    with torch.no_grad():
        # nothing at its initial value, so that a bias in the wrong place is seen
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "native"
    model = build()
    write_export(folder, model.state_dict(), Description(model.config, tokenizer))
    return folder


@pytest.fixture(scope="module")
def hf(native: Path) -> Path:
    pytest.importorskip("transformers")
    convert(native, native.parent / "hf", Request("hf"))
    return native.parent / "hf"


@pytest.fixture(scope="module")
def open_clip(native: Path) -> Path:
    pytest.importorskip("transformers")
    convert(native, native.parent / "open_clip", Request("open_clip"))
    return native.parent / "open_clip"


def assert_same(one: Path, other: Path) -> None:
    first, second = read_model(one), read_model(other)
    assert first.description.config == second.description.config
    assert first.description.rules == second.description.rules
    assert first.description.resize == second.description.resize
    assert first.state.keys() == second.state.keys()
    assert all(torch.equal(tensor, second.state[name]) for name, tensor in first.state.items())


@pytest.mark.parametrize("form", ["hf", "open_clip"])
def test_there_and_back_is_the_same_bit_by_bit(
    native: Path, form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(form)
    assert_same(native, folder)
    convert(folder, tmp_path / "back", Request("native"))
    assert_same(native, tmp_path / "back")
    tokens = [load_model(path).tokenize(CAPTIONS) for path in (native, folder, tmp_path / "back")]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("form", ["hf", "open_clip"])
def test_a_bottleneck_is_exported_as_a_full_table(form: str, tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = build(bottleneck=6)
    write_export(tmp_path / "native", model.state_dict(), Description(model.config, tokenizer))
    convert(tmp_path / "native", tmp_path / form, Request(form))
    convert(tmp_path / "native", tmp_path / "copy", Request("native"))
    assert read_model(tmp_path / form).description.config.text.bottleneck is None
    assert_same(tmp_path / "native", tmp_path / "copy")
    ours, theirs = (load_model(tmp_path / name).embed_texts(CAPTIONS) for name in ("native", form))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_the_record_says_what_was_compared(hf: Path, open_clip: Path) -> None:
    for folder, peer in ((hf, "transformers"), (open_clip, "open_clip_torch")):
        record = json.loads((folder / "conversion.json").read_text())
        assert record["peer"].startswith(peer)
        assert record["largest_difference"].keys() == {"image_embedding", "text_embedding"}
        assert all(value < 2e-6 for value in record["largest_difference"].values())
        assert (record["pictures"], record["texts"], record["tokenizer"]) == (4, 8, "tokenizer.model")
        assert len(record["weights"]["loaded"]) == len(build().state_dict())
        assert record["left_out"] == record["made_up"] == []


def test_big_vision_to_native_to_hf(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    np.savez(tmp_path / "weights.npz", **flax_arrays(build(naflex=True), stacked=True))
    convert(tmp_path / "weights.npz", tmp_path / "native", Request("native"))
    convert(tmp_path / "native", tmp_path / "hf", Request("hf"))
    state, expected = read_model(tmp_path / "hf").state, build(naflex=True).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["Siglip2Model"]
    card = (tmp_path / "hf/README.md").read_text()
    assert "| of any shape (NaFlex), positions learned on a grid of 4 x 4, patches of 4 |" in card


@pytest.mark.parametrize("name", ["hf_siglip_b8_i32", "hf_siglip_so14_i42", "hf_siglip2_nf_p8_g4"])
def test_a_peers_own_file_is_written_again_to_the_bit(name: str, tmp_path: Path) -> None:
    """Names, shapes and values of transformers' files, back from ours."""
    pytest.importorskip("transformers")
    convert(golden_folder(name), tmp_path / "again", Request("hf"))
    theirs, ours = (
        load_file(path / "model.safetensors") for path in (golden_folder(name), tmp_path / "again")
    )
    assert theirs.keys() == ours.keys()
    assert all(
        tensor.shape == ours[key].shape and torch.equal(tensor, ours[key]) for key, tensor in theirs.items()
    )


# what a user of the two libraries would write, without a line of ours
ELSEWHERE = """
import json, sys
import open_clip, torch, transformers
from PIL import Image
hf, clip, out, *pictures = sys.argv[1:]
pictures = [Image.open(path) for path in pictures]
captions = json.loads(sys.stdin.read())
answers = {}
with torch.inference_mode():
    model, processor = (getattr(transformers, c).from_pretrained(hf) for c in ("AutoModel", "AutoProcessor"))
    inputs = processor(text=captions, images=pictures, padding="max_length", truncation=True, return_tensors="pt")
    assert "attention_mask" not in inputs
    output = model(**inputs)
    answers["hf"] = [output.image_embeds.tolist(), output.text_embeds.tolist()]
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + clip)
    tokenizer = open_clip.get_tokenizer("local-dir:" + clip)
    images = model.eval().encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
    answers["open_clip"] = [images.tolist(), model.encode_text(tokenizer(captions), normalize=True).tolist()]
    answers["scale"] = model.logit_scale.item()
assert not [name for name in sys.modules if name.startswith("siglip_train")]
json.dump(answers, open(out, "w"))
"""


def test_a_process_without_us_gives_the_same_embeddings_and_ranking(
    native: Path, hf: Path, open_clip: Path, tmp_path: Path
) -> None:
    pictures = [probe._drawn(16, 16).rotate(90 * turn) for turn in range(4)]
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    arguments = [str(hf), str(open_clip), str(tmp_path / "out.json"), *map(str, paths)]
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=tmp_path,
        input=json.dumps(CAPTIONS),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads((tmp_path / "out.json").read_text())
    loaded = load_model(native)
    with torch.inference_mode():
        image = torch.cat([loaded.model.encode_image(loaded.preprocess(picture)) for picture in pictures])
        text = loaded.model.encode_text(loaded.tokenize(CAPTIONS))
    for peer in ("hf", "open_clip"):
        theirs = [torch.tensor(part) for part in answers[peer]]
        # measured 1.8e-7; images have the model's size, as the libraries' resizing differs by up to 3 levels
        torch.testing.assert_close(theirs[0], image, rtol=0, atol=2e-6)
        torch.testing.assert_close(theirs[1], text, rtol=0, atol=2e-6)
        assert torch.equal((theirs[0] @ theirs[1].T).argsort(dim=1), (image @ text.T).argsort(dim=1))
    assert answers["scale"] == pytest.approx(loaded.model.logit_scale.item())


def test_a_tokenizer_that_transformers_would_change_is_kept_as_it_is(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a config of siglip2, transformers puts a tokenizer of its own, which gives other tokens in silence."""
    transformers = pytest.importorskip("transformers")
    model = build(naflex=True)
    write_export(tmp_path / "n", model.state_dict(), Description(model.config, tokenizer))
    convert(tmp_path / "n", tmp_path / "hf", Request("hf"))
    with monkeypatch.context() as patch:
        # where nobody can be asked, nothing is left to chance
        patch.setattr("importlib.util.find_spec", lambda name: None)
        convert(tmp_path / "n", tmp_path / "unasked", Request("hf"))
    expected = load_model(tmp_path / "n").tokenize(CAPTIONS).tolist()

    def rows(folder: Path, **options: object) -> list[list[int]]:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, **options)
        return theirs(CAPTIONS, padding="max_length", truncation=True)["input_ids"]

    for folder in (tmp_path / "hf", tmp_path / "unasked"):
        assert rows(folder) == expected
        assert load_model(folder).tokenize(CAPTIONS).tolist() == expected
        processor = transformers.AutoProcessor.from_pretrained(folder)
        assert processor(text=CAPTIONS)["input_ids"] == expected
    config = tmp_path / "unasked" / "tokenizer_config.json"
    content = json.loads(config.read_text())
    if content.pop("auto_map", None):
        with pytest.raises(OSError, match="load_it_without_trust_remote_code"):
            rows(tmp_path / "unasked", trust_remote_code=True)
    # version 5.10 leaves it as it is even without the mark, 5.23 does not
    config.write_text(json.dumps(content))
    marked = "auto_map" in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (rows(tmp_path / "unasked") == expected) == (not marked)


def test_a_text_tower_without_projection_gets_one_that_changes_nothing(
    tmp_path: Path, tokenizer: Path
) -> None:
    pytest.importorskip("transformers")
    model = build(projection=False)
    write_export(tmp_path / "n", model.state_dict(), Description(model.config, tokenizer))
    done = convert(tmp_path / "n", tmp_path / "hf", Request("hf"))
    assert done.made_up == ["text_model.head.weight", "text_model.head.bias"]
    assert done.largest_difference["text_embedding"] < 2e-6
    convert(tmp_path / "n", tmp_path / "open_clip", Request("open_clip"))
    assert_same(tmp_path / "n", tmp_path / "open_clip")


def test_the_vision_tower_alone(native: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    done = convert(native, tmp_path / "tower", Request("hf", part="vision"))
    assert {name.partition(".")[0] for name in done.left_out} == {"text", "logit_scale", "logit_bias"}
    tower = transformers.AutoModel.from_pretrained(tmp_path / "tower")
    assert type(tower).__name__ == "SiglipVisionModel"
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        theirs = tower(pixels, output_hidden_states=True)
        loaded = load_model(native)
        ours = loaded.model.vision(*patchify(pixels, 4))
    torch.testing.assert_close(theirs.last_hidden_state, ours.tokens, rtol=0, atol=2e-5)


@pytest.mark.parametrize("naflex", one_in(2, [True, False]))
def test_onnx_graphs_take_any_number_and_any_grid(
    tmp_path: Path, tokenizer: Path, naflex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(naflex=naflex)
    write_export(tmp_path / "n", model.state_dict(), Description(model.config, tokenizer))
    done = convert(tmp_path / "n", tmp_path / "onnx", Request("onnx"))
    assert done.peer.startswith("onnxruntime")
    # measured 2.3e-7
    assert max(done.largest_difference.values()) < 2e-6
    settings = json.loads((tmp_path / "onnx/onnx_config.json").read_text())
    assert settings["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    if naflex:
        images = padded(rectangle(3, 5, 2), 14, content=9.0)
        session = onnxruntime.InferenceSession(tmp_path / "onnx/vision.onnx")
        theirs = session.run(None, {name: part.numpy() for name, part in images._asdict().items()})[0]
        with torch.inference_mode():
            torch.testing.assert_close(
                torch.from_numpy(theirs), model.encode_image(images), rtol=0, atol=2e-6
            )
    write_image(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    (card,) = code_of(Path("onnx/README.md"))
    ((_, images_alone),) = usage("onnx", model.config, "onnx", has_tokenizer=False)
    loaded = load_model("n")
    for code in (card, images_alone):
        values: dict = {}
        exec(code, values)
        near(values["images"], loaded.embed_images("image.jpg"))
        assert ("texts" in values) == (code == card)
    exec(card, values)
    near(values["texts"], loaded.embed_texts(["a photo of a cat", "a photo of a dog"]))
    logits = loaded.embed_images("image.jpg") @ values["texts"].T * model.logit_scale.exp() + model.logit_bias
    torch.testing.assert_close(torch.from_numpy(values["logits"]), logits.detach(), rtol=0, atol=1e-4)


def test_onnx_without_its_packages_is_a_mistake(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx and onnxscript: pip install"):
        convert(native, tmp_path / "onnx", Request("onnx"))
    assert list(tmp_path.iterdir()) == []


def test_another_size_is_resampled_and_said(native: Path, tmp_path: Path) -> None:
    done = convert(native, tmp_path / "large", Request("native", image_size=24))
    assert done.weights.resampled == ["vision.position_table"]
    table = read_model(tmp_path / "large").state["vision.position_table"]
    assert torch.equal(table, resize_position_table(read_model(native).state["vision.position_table"], 6))
    done = convert(native, tmp_path / "coarse", Request("native", image_size=32, patch_size=8))
    assert done.weights.resampled == ["vision.patch_embedding.weight"]


def test_without_the_library_the_files_are_read_back_and_that_is_said(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command.main([str(native), str(tmp_path / "hf"), "--to", "hf"])
    output = capsys.readouterr().out
    assert "is not installed, so it was not asked" in output
    assert "largest difference to what was read back" in output
    assert json.loads((tmp_path / "hf/conversion.json").read_text())["peer"] is None


def test_sides_that_differ_leave_nothing_behind(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = read_model(native)
    wrong.description.config.vision.gelu = "erf"
    monkeypatch.setattr(conversion, "_model", lambda files: build())
    monkeypatch.setattr(conversion, "read_model", lambda path: wrong)
    with pytest.raises(UserError, match=r"image_embedding of .* differs from ours"):
        convert(native, tmp_path / "hf", Request("hf"))
    assert list(tmp_path.iterdir()) == []


def pictures_in(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "a.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_pictures_of_the_users_own(native: Path, tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "pictures")
    assert convert(native, tmp_path / "copy", Request("native", pictures=folder)).pictures == 1
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match="no image can be read"):
        convert(native, tmp_path / "other", Request("native", pictures=folder))


def test_what_a_killed_run_or_a_bad_copy_left_of_the_facts(native: Path, tmp_path: Path) -> None:
    """The line of metrics that was being written is passed over; a damaged file of facts is one line."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000002"
    shutil.copytree(native, checkpoint / "weights")
    (run / "checkpoints" / "LAST").write_text("step-00000002\n")
    (run / "config.yaml").write_text("global_batch_size: 24\n")
    (checkpoint / "state.json").write_text('{"step": 2, "samples_seen": 48}')
    (run / "metrics.jsonl").write_text('{"step": 2, "val/held_out/acc1": 0.25}\n{"step": 3, "val/held_o')
    convert(run, tmp_path / "copy", Request("native"))
    card = (tmp_path / "copy" / "README.md").read_text()
    for row in ("| pairs of a global batch | 24 |", "| steps | 2 |", "| val/held_out/acc1 | 0.25 |"):
        assert row in card
    for file in (checkpoint / "state.json", run / "conversion.json"):
        for text in ('{"st', "[]", "\xff", '{"step": "two", "samples_seen": 48, "training": []}'):
            file.write_text(text, encoding="latin-1")
            with pytest.raises(UserError, match=rf"{file.name}"):
                convert(run, tmp_path / "other", Request("native"))
    (run / "conversion.json").write_text('{"training": 3}')
    with pytest.raises(UserError, match=r"conversion\.json: training: expected a mapping, got 3"):
        convert(run, tmp_path / "other", Request("native"))
    assert not (tmp_path / "other").exists()


def mistakes(tmp_path: Path, native: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments after SRC and DST, and what is said."""
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in native.iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    incomplete = flax_arrays(build())
    del incomplete["params/img/MAPHead_0/probe"]
    np.savez(tmp_path / "incomplete.npz", **incomplete)
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "config.json").write_text((native / "config.json").read_text())
    state = load_file(native / "model.safetensors")
    del state["text.head.bias"]
    save_file(state, missing / "model.safetensors")
    new = str(tmp_path / "new")
    return {
        "wrong class": ([str(bert), new, "--to", "hf"], "model_type bert is not supported"),
        "truncated": ([str(cut), new, "--to", "hf"], "cannot read the weights"),
        "pickle": ([str(tmp_path / "weights.pt"), new, "--to", "hf"], "is a pickle"),
        "incomplete npz": (
            [str(tmp_path / "incomplete.npz"), new, "--to", "hf"],
            "missing: img/MAPHead_0/probe",
        ),
        "missing tensor": ([str(missing), new, "--to", "hf"], "missing: text.head.bias"),
        "unknown target": ([str(native), new, "--to", "tensorflow"], "invalid choice: 'tensorflow'"),
        "no target": ([str(native), new], "--to"),
        "nothing there": ([str(tmp_path / "nothing"), new, "--to", "hf"], "does not exist"),
        "overwriting": ([str(native), str(cut), "--to", "hf"], "exists; choose another folder"),
        "part": ([str(native), new, "--to", "open_clip", "--part", "vision"], "in hf only"),
        "no tokenizer": (
            [str(native), new, "--to", "hf", "--tokenizer", "nowhere"],
            "nowhere does not exist",
        ),
        "patch size": (
            [str(native), new, "--to", "hf", "--patch-size", "999"],
            "smaller than patch_size 999",
        ),
        "negative patch size": (
            [str(native), new, "--to", "hf", "--patch-size", "-4"],
            "--patch-size must be at least 1, got -4",
        ),
        "no image size": (
            [str(native), new, "--to", "hf", "--image-size", "0"],
            "--image-size must be at least 1, got 0",
        ),
        "image size of any grid": (
            [str(golden_folder("hf_siglip2_nf_p8_g4")), new, "--to", "hf", "--image-size", "64"],
            "--image-size has nothing to resample",
        ),
    }


def test_a_mistake_is_one_line_and_status_2(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, (arguments, message) in mistakes(tmp_path, native).items():
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        said = capsys.readouterr().err
        assert stop.value.code == 2, name
        assert message in said, name
        assert said.count("\n") == 1, name
        assert sorted(tmp_path.iterdir()) == before, name


def test_a_foreign_tokenizer_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    config = small_config()
    model = Siglip(config)
    write_export(tmp_path / "n", model.state_dict(), Description(config))
    with pytest.raises(UserError, match=r"has 400 tokens, the model 19: they do not belong together"):
        convert(tmp_path / "n", tmp_path / "hf", Request("hf", tokenizer=str(tokenizer)))


def test_a_naflex_model_has_no_form_in_open_clip(tmp_path: Path) -> None:
    model = build(naflex=True)
    write_export(tmp_path / "n", model.state_dict(), Description(model.config))
    with pytest.raises(UserError, match="no SigLIP model for variable grids"):
        convert(tmp_path / "n", tmp_path / "open_clip", Request("open_clip"))
