"""`siglip-eval` as its user runs it: an export and a run, on one rank and two, and mistakes in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from siglip_train import evaluate as evaluate_module
from siglip_train.interop.native import Description, write_export
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from tests.forks import run_program


def evaluate(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess:
    result = run_program("siglip_train.evaluate", [*map(str, arguments), "device=cpu"], ranks=ranks)
    assert "Traceback" not in result.stderr, result.stderr
    return result


@pytest.fixture(scope="module")
def export(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, small enough to embed the whole set in a second."""
    torch.manual_seed(0)
    size = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
    vision = VisionConfig(image_size=32, patch_size=8, **size)
    model = Siglip(SiglipConfig(vision, TextConfig(context_length=24, vocab_size=1024, **size)))
    folder = tmp_path_factory.mktemp("models") / "export"
    write_export(
        folder, model.state_dict(), Description(model.config, tokenizer=tiny_data / "tokenizer.model")
    )
    return folder


@pytest.fixture(scope="module")
def places(tiny_tasks: list[str]) -> list[str]:
    """Overrides of an evaluation as the quick start's, on the small data set."""
    return ["evaluation=quickstart", "tasks.loss.reference_batch=8", "workers=0", *tiny_tasks]


def metrics_in(path: Path) -> dict[str, float]:
    return json.loads(path.read_text(encoding="utf-8"))["metrics"]


@pytest.mark.dist
def test_table_and_json_agree_and_ranks_do_not_matter(
    export: Path, places: list[str], tmp_path: Path
) -> None:
    benchmark = f"benchmark_dir={tmp_path}/benchmark"
    result = evaluate(f"checkpoint={export}", *places, "tasks.seen.bootstrap=50", benchmark)
    assert result.returncode == 0, result.stderr
    alone = metrics_in(export / "evaluation.json")
    assert {"seen/acc1", "unseen/acc1", "retrieval/image_retrieval_recall@1", "loss/loss"} <= alone.keys()
    assert any(name.startswith("retrieval/de/") for name in alone)
    # a model that knows nothing: the loss is near the 10 of its bias
    assert alone["loss/loss"] == pytest.approx(10.0, abs=1.5)
    assert f"{alone['seen/acc1']:.4f}" in result.stdout
    assert alone["seen/acc1_low"] <= alone["seen/acc1"] <= alone["seen/acc1_high"]
    files = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "benchmark").iterdir()]
    results = json.loads((export / "evaluation.json").read_text(encoding="utf-8"))["results"]
    assert sorted(files, key=str) == sorted(results, key=str)
    unseen = next(each for each in results if each["dataset"] == "unseen")
    assert (unseen["task"], unseen["model"]) == ("zeroshot_classification", "export")
    assert unseen["metrics"]["acc1"] == alone["unseen/acc1"]
    report = (export / "evaluation.html").read_text(encoding="utf-8")
    for shown in (
        "most frequent confusions",
        "Mistakes",
        "data:image/jpeg;base64,",
        "Images found for a caption",
    ):
        assert shown in report
    assert "http" not in report.replace("http-equiv", "")
    result = evaluate(
        f"checkpoint={export}",
        *places,
        "tasks.seen.bootstrap=50",
        f"output={tmp_path}/two.json",
        ranks=2,
    )
    assert result.returncode == 0, result.stderr
    assert metrics_in(tmp_path / "two.json") == pytest.approx(alone, abs=1e-5)


def test_a_run_is_evaluated_with_its_own_tasks_and_gets_a_report(
    export: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(export, tmp_path / "checkpoints" / "step-00000001" / "weights")
    (tmp_path / "checkpoints" / "LAST").write_text("step-00000001\n")
    (tmp_path / "config.yaml").write_text(
        "evaluation:\n  tasks:\n    images:\n      _target_: siglip_train.evals.retrieval.Retrieval\n"
        f"      shards: {tiny_data}/validation/*.tar\n      text: json:captions\n      languages: [de]\n"
    )
    result = evaluate(f"checkpoint={tmp_path}", "workers=0")
    assert result.returncode == 0, result.stderr
    assert "images/text_retrieval_recall@10" in metrics_in(tmp_path / "evaluation.json")
    details = json.loads((tmp_path / "evaluations" / "images.json").read_text(encoding="utf-8"))["details"]
    assert list(details["languages"]) == ["de"]
    assert "data:image/jpeg;base64," in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluation=quickstart"], ["checkpoint"]),
        (["checkpoint=/nowhere", "evaluation=quickstart"], ["/nowhere"]),
        (["checkpoint=/nowhere"], ["there is no /nowhere"]),
        (["checkpoint={export}"], ["evaluation=NAME"]),
        (
            ["checkpoint={export}", "evaluation=nothing"],
            ["evaluation", "nothing", "benchmark, captions, coco_retrieval, "],
        ),
        (["checkpoint={export}", "evaluation=quickstart", "batch=3"], ["batch"]),
        (["checkpoint={export}", "evaluation=quickstart", "batch_size=0"], ["batch_size"]),
        (["checkpoint={export}", "evaluation=coco_retrieval"], ["tasks.coco.shards=…"]),
        (["checkpoint={export}", "evaluation=probes", "tasks.probes.train=x"], ["tasks.probes.test=…"]),
        (
            [
                "checkpoint={export}",
                "evaluation=probes",
                "tasks.probes.test=x",
                "tasks.probes.train={{shards: x, part: y}}",
            ],
            ["tasks.probes", "part"],
        ),
        (
            [
                "checkpoint={export}",
                "evaluation=quickstart",
                "tasks.seen.class_map=a",
                "tasks.seen.label_sets=b",
            ],
            ["tasks.seen", "class_map", "label_sets"],
        ),
        *(
            (
                ["checkpoint={export}", "evaluation=quickstart", f"tasks.{task}.{wrong}"],
                [task, *wrong.split("=")],
            )
            for task, wrong in (
                ("seen", "max_samples=0"),
                ("retrieval", "max_samples=0"),
                ("loss", "max_samples=0"),
                ("seen", "bootstrap=-5"),
                ("retrieval", "bootstrap=-5"),
            )
        ),
        (
            [
                "checkpoint={export}",
                "evaluation=probes",
                "tasks.probes.train=x",
                "tasks.probes.test={{shards: x, max_samples: -1}}",
            ],
            ["tasks.probes", "max_samples", "-1"],
        ),
        (
            [
                "checkpoint={export}",
                "evaluation=probes",
                "tasks.probes.train=x",
                "tasks.probes.test=y",
                "tasks.probes.bootstrap=-5",
            ],
            ["tasks.probes", "bootstrap", "-5"],
        ),
        (
            ["checkpoint={export}", "evaluation=quickstart", "tasks.seen.shards=nowhere.tar"],
            ["tasks.seen: no shard matches nowhere.tar"],
        ),
        (["checkpoint={export}", "evaluation=quickstart", "output=/nowhere/a.json"], ["/nowhere/a.json"]),
        (
            ["checkpoint={export}", "evaluation=quickstart", "output=res.html"],
            ["output", "res.html", "report"],
        ),
        (["checkpoint={export}", "evaluation=quickstart", "tasks.seen.shard=x"], ["tasks.seen", "shard"]),
    ],
)
def test_a_mistake_is_named_before_anything_is_loaded(
    export: Path, monkeypatch, capsys, arguments: list[str], words: list[str]
) -> None:
    message = refused([argument.format(export=export) for argument in arguments], monkeypatch, capsys)
    for word in words:
        assert word in message


def refused(arguments: list[str], monkeypatch, capsys) -> str:
    """The error line of a command that must end before a model is loaded."""
    # in this process, as each start of a new one takes seconds
    monkeypatch.setattr(evaluate_module, "load_model", None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["siglip-eval", *arguments])
    with pytest.raises(SystemExit) as leaving:
        evaluate_module.main()
    assert leaving.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (": : [", "cannot read {run}/config.yaml"),
        ("- 1", "{run}/config.yaml holds no config"),
        ("evaluation: 3", "{run} brings no tasks"),
        ("evaluation: {tasks: [1]}", "{run} brings no tasks"),
        ("evaluation: {tasks: null}", "{run} brings no tasks"),
    ],
)
def test_a_damaged_config_of_a_run_is_named(
    tmp_path: Path, monkeypatch, capsys, content: str, words: str
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert words.format(run=tmp_path) in refused([f"checkpoint={tmp_path}"], monkeypatch, capsys)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_benchmark_dir_that_cannot_be_made_is_named_before_anything_is_loaded(
    export: Path, places: list[str], tmp_path: Path, monkeypatch, capsys, place: str
) -> None:
    (tmp_path / "file").write_text("")
    arguments = [f"checkpoint={export}", *places, f"benchmark_dir={tmp_path}/{place}"]
    assert f"benchmark_dir: cannot make {tmp_path}/{place}" in refused(arguments, monkeypatch, capsys)
    assert (tmp_path / "file").read_text() == ""


def test_missing_shards_end_in_a_line_and_status_2(export: Path, places: list[str]) -> None:
    result = evaluate(f"checkpoint={export}", *places, "tasks.seen.shards=/none/*.tar")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "/none/*.tar" in result.stderr
