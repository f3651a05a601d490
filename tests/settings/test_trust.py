"""A config that is read back from a run may be a stranger's: it names evaluators, and runs nothing."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from siglip_train import evaluate
from siglip_train.data.remote.locations import expand, runs_a_program
from siglip_train.errors import UserError
from siglip_train.interop.runs import run_config
from siglip_train.settings.trust import check_read_back

RETRIEVAL = "siglip_train.evals.retrieval.Retrieval"


def check(node: Any, *, allow_pipe: bool = False, trusted_packages: tuple[str, ...] = ()) -> None:
    check_read_back(
        {"task": node}, "tasks", where="config.yaml", trusted_packages=trusted_packages, allow_pipe=allow_pipe
    )


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "hydra.utils.get_method",
        # paths through what a module of ours has imported
        "siglip_train.evals.base.os.system",
        "siglip_train.evals.base.json.loads",
        "siglip_train.evals.base.os",
        "siglip_train.evals.base.Path",
        "siglip_train.evals.base.Image.open",
        # ours, and no evaluator
        "siglip_train.evals.base.write_evaluations",
        "siglip_train.evals.base.Encoder",
        "siglip_train.data.remote.sources.source",
        "siglip_train.train.run",
        "siglip_train.evals.retrieval.Retrieval.__init__.__globals__",
        "siglip_train.evals.nothing.Nothing",
        ".os.system",
        "os",
        "",
        3,
        ["os.system"],
    ],
)
def test_a_config_that_is_read_back_names_evaluators_alone(target: Any) -> None:
    for node in ({"_target_": target}, {"_target_": RETRIEVAL, "shards": [{"deep": {"_target_": target}}]}):
        with pytest.raises(UserError, match=r"^tasks\.task\.(shards\.deep\.)?_target_ in config\.yaml"):
            check(node)


@pytest.mark.parametrize(
    "value",
    [
        "pipe:touch x",
        " pipe:touch x",
        "a.tar::pipe:touch x",
        "a.tar :: pipe:touch x",
        ["a.tar", "pipe:touch x"],
        {"train": {"shards": ["pipe:touch x"]}},
        # protocols of fsspec that connect, open files by templates, or unpickle what a server sends
        "reference://x",
        "dask://host/x",
        "DASK://host/x",
        "https://host/a.tar::ssh://host/x",
    ],
)
def test_a_config_that_is_read_back_runs_no_command_unless_it_is_allowed(value: Any) -> None:
    node = {"_target_": RETRIEVAL, "shards": value}
    with pytest.raises(UserError, match="allow_pipe=true"):
        check(node)
    check(node, allow_pipe=True)


@pytest.mark.parametrize("key", ["_args_", "_partial_", "_recursive_", "_convert_", "_anything_"])
def test_a_config_that_is_read_back_uses_no_other_feature_of_hydra(key: str) -> None:
    with pytest.raises(UserError, match=key):
        check({"_target_": RETRIEVAL, "shards": "a.tar", key: True})


def test_a_config_that_is_read_back_resolves_nothing() -> None:
    with pytest.raises(UserError, match="not resolved"):
        check({"_target_": RETRIEVAL, "shards": "${oc.env:HOME}/a.tar"})


def test_what_runs_write_is_taken() -> None:
    check({"_target_": RETRIEVAL, "shards": "data/{0..9}.tar::s3://bucket/x/", "text": "json:captions.*"})
    check({"_target_": "siglip_train.objectives.sigmoid.SigmoidLoss", "weight": 1.0})
    check(None)


def test_a_trusted_package_is_taken_at_its_word_and_no_other(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import os\nfrom os import system\nclass Task: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"trusted_packages=\[mine\]"):
        check({"_target_": "mine.Task"})
    assert "mine" not in sys.modules
    check({"_target_": "mine.Task"}, trusted_packages=("mine",))
    for target in ("mine.system", "mine.os.system", "miner.Task"):
        with pytest.raises(UserError):
            check({"_target_": target}, trusted_packages=("mine",))


def test_a_strangers_run_is_refused_before_anything_of_it_is_opened(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    trap = tmp_path / "trap"
    tasks = {
        "target": {"_target_": "os.system", "command": f"touch {trap}"},
        "pipe": {"_target_": RETRIEVAL, "shards": f"pipe:touch {trap}"},
    }
    for name, task in tasks.items():
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump({"evaluation": {"tasks": {"task": task}}}))
        monkeypatch.setattr(sys, "argv", ["siglip-eval", f"checkpoint={run}", "device=cpu"])
        monkeypatch.setattr(evaluate, "load_model", None)
        with pytest.raises(SystemExit) as leaving:
            evaluate.main()
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert leaving.value.code == 2
        assert error.startswith(f"error: evaluation.tasks.task.{'shards' if name == 'pipe' else '_target_'}")
    assert not trap.exists()


def test_a_config_whose_aliases_would_unfold_to_gigabytes_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="aliases"):
        run_config(tmp_path)


def test_a_config_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml"):
        run_config(tmp_path)


def test_a_file_whose_name_is_a_command_is_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pipe:touch trap").write_bytes(b"")
    assert expand("*touch trap") == ["./pipe:touch trap"]
    assert expand("{pipe,x}:touch trap".replace("{pipe,x}", "{pip,pip}e")) == ["./pipe:touch trap"] * 2


def test_braces_make_no_chain_of_filesystems() -> None:
    with pytest.raises(UserError, match="::"):
        expand("memory://a:{:,:}memory://b/")
    assert not runs_a_program("data/{0..3}.tar")
