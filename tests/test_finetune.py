"""Fine-tuning as its user runs it: a model, LoRA and a head on it, interrupted, gone on with, evaluated, exported."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from siglip_train import convert
from siglip_train.batch import Batch
from siglip_train.data.shards.select import Selection
from siglip_train.errors import UserError
from siglip_train.evals.classification import HeadAccuracy
from siglip_train.evals.loader import EvaluationSource, build_evaluation_loader
from siglip_train.interop.load import load_model
from siglip_train.interop.runs import read_heads
from siglip_train.objectives.forward_pass import ForwardPass
from tests.test_evaluate import evaluate
from tests.test_train import losses, run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_run: list[str], tiny_data: Path) -> dict[str, Path]:
    """`start` trains the pairs; `straight` and `broken` fine-tune it for six steps, the latter stopped after three."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("finetune")
    shards = f"{tiny_data}/classes_seen/*.tar"
    base = [argument for argument in small_run if not argument.startswith(("evaluation.", "total", "checkp"))]
    base += ["~evaluation.tasks", "checkpoint.every_steps=3"]
    classify = [
        "+objective@objectives.classification=classification", "objectives.sigmoid=null",
        "++objectives.classification.classes=80", f"data.sources.tiny.shards={shards}",
        "++data.sources.tiny.text=null", "++data.sources.tiny.label=cls", "total_samples=144",
        f"init_from={folder}/start", "seed=1", "optim.rules=[]", "engine.activation_checkpointing=true",
        "++adapters.rank=2", "++adapters.dropout=0.3", "++adapters.pattern=vision.encoder",
        "+evaluation.tasks.head._target_=siglip_train.evals.classification.HeadAccuracy",
        f"+evaluation.tasks.head.shards={shards}", "+evaluation.tasks.head.select.held_out=0.2",
        "+evaluation.tasks.head.select.part=held_out",
    ]  # fmt: skip
    commands = [
        [*base, "total_samples=72", f"run_dir={folder}/start"],
        [*base, *classify, f"run_dir={folder}/straight"],
        [*base, *classify, f"run_dir={folder}/broken", "stop_after_steps=3"],
        [*base, *classify, f"run_dir={folder}/broken"],
    ]
    for command in commands:
        result = run(command)
        assert result.returncode == 0, result.stderr
    return {name: folder / name for name in ("start", "straight", "broken")}


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / (run_dir / "checkpoints" / "LAST").read_text().strip()


def test_a_run_with_adapters_and_dropout_goes_on_to_the_last_bit(runs: dict[str, Path]) -> None:
    assert sorted(losses(runs["straight"])) == [1, 2, 3, 4, 5, 6]
    assert losses(runs["broken"]) == losses(runs["straight"])
    for file in ("weights/model.safetensors", "heads.safetensors", "moments.safetensors"):
        straight, broken = (load_file(newest(runs[name]) / file) for name in ("straight", "broken"))
        assert straight.keys() == broken.keys()
        assert all(torch.equal(straight[name], broken[name]) for name in straight), file
    moments = load_file(newest(runs["straight"]) / "moments.safetensors")
    assert all(".lora_" in name or ".classifier." in name for name in moments), "nothing else is trained"


def test_the_checkpoint_is_a_plain_model_of_which_the_adapted_layers_alone_have_changed(
    runs: dict[str, Path],
) -> None:
    before, after = (load_model(runs[name]).model.state_dict() for name in ("start", "straight"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = [*(f"attention.{part}" for part in ("query", "key", "value", "out")), "mlp.fc1", "mlp.fc2"]
    assert changed == {f"vision.encoder.blocks.0.{layer}.weight" for layer in layers}


def test_what_was_trained_is_announced_and_the_head_is_evaluated(runs: dict[str, Path]) -> None:
    log = (runs["straight"] / "log.txt").read_text()
    assert "parameters are trained" in log
    assert "got no gradient" not in log
    state = json.loads((newest(runs["straight"]) / "state.json").read_text())
    assert "model.vision.patch_embedding.weight" in state["pretrained"]
    evaluation = json.loads((runs["straight"] / "evaluations" / "head.json").read_text())
    assert {"acc1", "acc5", "mean_per_class_recall", "n"} == evaluation["metrics"].keys()


def inside(run_dir: Path) -> dict[str, float]:
    """What the run's own evaluation has found at its end."""
    return json.loads((run_dir / "evaluations" / "head.json").read_text())["metrics"]


def test_the_head_of_a_checkpoint_is_as_accurate_as_inside_the_run(
    runs: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    task = (
        "{_target_: siglip_train.evals.classification.HeadAccuracy, select: {held_out: 0.2, part: held_out}, "
        f"shards: '{tiny_data}/classes_seen/*.tar'}}"
    )
    arguments = [f"tasks.head={task}", "workers=0", f"output={tmp_path}/out.json"]
    done = evaluate(f"checkpoint={newest(runs['straight'])}", *arguments)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out.json").read_text())["metrics"]
    assert metrics == {f"head/{name}": value for name, value in inside(runs["straight"]).items()}


def test_without_such_a_head_the_task_says_so() -> None:
    with pytest.raises(
        UserError, match="no classification head named kind here: this task measures one of a run"
    ):
        HeadAccuracy(shards="nowhere.tar", objective="kind").run(SimpleNamespace(heads={}))


def test_transformers_classifies_the_held_out_pictures_as_the_run_did(
    runs: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    names = tiny_data / "classes_seen/classnames.txt"
    arguments = ["--to", "hf", "--part", "classifier", "--classnames", str(names)]
    convert.main([str(runs["straight"]), str(tmp_path / "hf"), *arguments])
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
    assert list(theirs.config.id2label.values()) == names.read_text().split("\n")[:80]
    loaded, head = load_model(runs["straight"]), read_heads(runs["straight"])["classification"]
    source = EvaluationSource(
        shards=f"{tiny_data}/classes_seen/*.tar", label="cls", select=Selection(held_out=0.2, part="held_out")
    )
    (batch,) = build_evaluation_loader(source, loaded.transform, batch_size=133)
    size, patch = loaded.transform.image_size, loaded.transform.patch_size
    patches = batch.images.patches.reshape(133, size // patch, size // patch, patch, patch, 3)
    pixels = patches.permute(0, 5, 1, 3, 2, 4).reshape(133, 3, size, size)
    with torch.inference_mode():
        logits = theirs(pixels / 127.5 - 1).logits
        ours = head.logits(ForwardPass(loaded.model, Batch({"images": batch.images})))
    # measured 3.0e-8
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-6)
    right = (logits.argmax(dim=1) == torch.tensor(batch.labels).flatten()).sum().item()
    assert right / 133 == inside(runs["straight"])["acc1"]
