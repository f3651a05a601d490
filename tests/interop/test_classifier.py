"""A run's classification head as Hugging Face's class for it: the same logits without our code, and mistakes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from siglip_train import convert as command
from siglip_train.batch import Batch
from siglip_train.errors import UserError
from siglip_train.interop import to_huggingface
from siglip_train.interop.conversion import Request, convert
from siglip_train.interop.load import load_model
from siglip_train.interop.native import Description, write_export
from siglip_train.interop.probe import _drawn
from siglip_train.interop.runs import read_heads
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.forward_pass import ForwardPass
from tests.models.small import small_config

NAMES = ["cat", "dog", "a red bird"]
TARGET = "siglip_train.objectives.classification.Classification"


def build_run(run: Path, *heads: str, features: str = "tokens", **vision: object) -> Path:
    """What a run leaves that has trained `heads`, none of them at its initial value."""
    torch.manual_seed(3)
    model = Siglip(small_config(**vision))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    checkpoint = run / "checkpoints" / "step-00000007"
    write_export(checkpoint / "weights", model.state_dict(), Description(model.config))
    (run / "checkpoints/LAST").write_text("step-00000007\n")
    node = {"_target_": TARGET, "classes": 3, "width": 24, "features": features, "weight": 1.0}
    objectives = {"left_out": None, **{head: dict(node) for head in heads}}
    (run / "config.yaml").write_text(yaml.safe_dump({"objectives": objectives, "global_batch_size": 64}))
    shapes = {"weight": (3, 24), "bias": (3,)}
    save_file(
        {
            f"objectives.{name}.classifier.{part}": torch.randn(shapes[part])
            for name in heads
            for part in shapes
        },
        checkpoint / "heads.safetensors",
    )
    return run


def our_logits(run: Path, pictures: list) -> Tensor:
    """As the objective has them, from the loaded model."""
    loaded = load_model(run)
    with torch.inference_mode():
        batches = [Batch({"images": loaded.preprocess(picture)}) for picture in pictures]
        head = read_heads(run)["kind"]
        return torch.cat([head.logits(ForwardPass(loaded.model, batch)) for batch in batches])


@pytest.mark.parametrize(
    ("vision", "features", "expected"),
    [
        ({}, "tokens", "SiglipForImageClassification"),
        ({"pool": "average"}, "pooled", "SiglipForImageClassification"),
        ({"position_grid": 4}, "tokens", "Siglip2ForImageClassification"),
    ],
)
def test_transformers_opens_it_and_gives_the_same_logits(
    tmp_path: Path, vision: dict, features: str, expected: str
) -> None:
    transformers = pytest.importorskip("transformers")
    run = build_run(tmp_path / "run", "kind", features=features, **vision)
    done = convert(run, tmp_path / "hf", Request("hf", part="classifier", class_names=NAMES))
    # measured 0, of logits up to 4.4
    assert done.largest_difference["logits"] < 1e-5
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == expected
    assert model.num_labels == 3
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: label for label, name in enumerate(NAMES)}
    # of the model's size, as resizing differs by up to a level
    pictures = [_drawn(16, 16).rotate(90 * turn) for turn in range(4)]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        theirs = model(**processor(images=pictures, return_tensors="pt")).logits
    # measured 1.2e-6, as transformers normalises by two steps
    torch.testing.assert_close(theirs, our_logits(run, pictures), rtol=0, atol=1e-5)


def test_record_card_and_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    run = build_run(tmp_path / "run", "kind")
    # a checkpoint inside its run is as good as the run
    source = run / "checkpoints/step-00000007"
    command.main([str(source), str(tmp_path / "hf"), "--to", "hf", "--part", "classifier"])
    said = capsys.readouterr().out
    assert "tensors left out" in said
    assert "4 images: logits" in said
    record = json.loads((tmp_path / "hf/conversion.json").read_text())
    assert (record["part"], record["classes"], record["texts"]) == ("classifier", 3, 0)
    assert record["largest_difference"].keys() == {"logits"}
    assert {name.split(".")[0] for name in record["left_out"]} == {
        "text",
        "logit_scale",
        "logit_bias",
        "vision",
    }
    assert all(name.startswith("vision.pool.") for name in record["left_out"] if name.startswith("vision"))
    card = (tmp_path / "hf/README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert 'AutoModelForImageClassification.from_pretrained("hf")' in card
    assert "| objectives | kind |" in card
    assert "| pairs of a global batch | 64 |" in card
    assert json.loads((tmp_path / "hf/config.json").read_text())["id2label"]["2"] == "LABEL_2"


def test_one_of_several_heads_at_another_size(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = build_run(tmp_path / "run", "kind", "colour")
    done = convert(run, tmp_path / "hf", Request("hf", part="classifier", objective="colour", image_size=24))
    assert done.weights.resampled == ["vision.position_table"]
    weight = read_heads(run)["colour"].classifier.weight
    assert torch.equal(weight, load_classifier(tmp_path / "hf").weight)


def load_classifier(folder: Path) -> torch.nn.Linear:
    import transformers

    return transformers.AutoModelForImageClassification.from_pretrained(folder).classifier


def test_sides_that_differ_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    run = build_run(tmp_path / "run", "kind")
    theirs = to_huggingface.transformers_logits
    monkeypatch.setattr(
        to_huggingface, "transformers_logits", lambda *given: {"logits": theirs(*given)["logits"] * 1.001}
    )
    with pytest.raises(UserError, match=r"logits of transformers .* differs from ours"):
        convert(run, tmp_path / "hf", Request("hf", part="classifier"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def mistakes(folder: Path) -> dict[str, tuple[Path, list[str], str]]:
    """Source, arguments, and what is said."""
    one, two = build_run(folder / "one", "kind"), build_run(folder / "two", "kind", "colour")
    changed = build_run(folder / "changed", "kind")
    config = (changed / "config.yaml").read_text()
    (changed / "config.yaml").write_text(config.replace("classes: 3", "classes: 4"))
    pooled = build_run(folder / "pooled", "kind", features="pooled")
    token = build_run(folder / "token", "kind", pool="cls")
    (folder / "names.txt").write_text("cat\ndog\n")
    classifier = ["--to", "hf", "--part", "classifier"]
    return {
        "no head": (build_run(folder / "none"), classifier, "has no classification head: give a run"),
        "no run": (one / "checkpoints/step-00000007/weights", classifier, "has no classification head"),
        "several": (two, classifier, "choose with --objective colour or kind"),
        "unknown": (two, [*classifier, "--objective", "size"], "no classification head size, only colour, kind"),
        "pooled": (pooled, classifier, "(features: pooled, model.vision.pool is map)"),
        "class token": (token, classifier, "model.vision.pool is cls; HuggingFace's SigLIP has no class token"),
        "names": (one, [*classifier, "--classnames", str(folder / "names.txt")], "2 class names, but the head has 3"),
        "no names": (one, [*classifier, "--classnames", "nowhere"], "the class names: cannot read nowhere"),
        "config": (changed, classifier, "objectives.kind in"),
        "target": (one, ["--to", "onnx", "--part", "classifier"], "part classifier has a form in hf only"),
        "part": (one, ["--to", "hf", "--objective", "kind"], "--objective and --classnames are for"),
    }  # fmt: skip


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cases = mistakes(tmp_path)
    before = sorted(tmp_path.iterdir())
    for name, (source, arguments, message) in cases.items():
        with pytest.raises(SystemExit) as stop:
            command.main([str(source), str(tmp_path / "new"), *arguments])
        said = capsys.readouterr().err
        assert stop.value.code == 2, name
        assert message in said, name
        assert said.count("\n") == 1, name
        assert sorted(tmp_path.iterdir()) == before, name


def test_a_classifier_is_no_image_text_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    convert(build_run(tmp_path / "run", "kind"), tmp_path / "hf", Request("hf", part="classifier"))
    with pytest.raises(UserError, match="no whole image-text model"):
        load_model(tmp_path / "hf")
