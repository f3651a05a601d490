"""Chains of stages: their commands, what is skipped and continued, forks, and the table at the end."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from siglip_train import recipe
from tests.composing import composed
from tests.conftest import ROOT
from tests.test_train import ENVIRONMENT, losses

CHAIN = """\
# a chain for tests
samples: 24e1
global_batch_size: 24
stages:
  base: {experiment: quickstart, until: 0.4}
  distilled:
    experiment: quickstart
    start: base
    keep: [0.8]
    overrides:
      - carry_over=[model,heads,objectives,optimizer,position]
      - +objective@objectives.self_distillation=self_distillation
      - +objectives.self_distillation.hidden=16
      - +objectives.self_distillation.prototypes=24
      - data.views.local=2
      - data.views.local_patches=2
  fork:
    experiment: quickstart
    start: distilled
    at: 0.8
    overrides: ['carry_over=[model,optimizer,position]']
"""

# stands in for `siglip-train`: notes its arguments, and fails or stops where a file says so
STANDS_IN = """\
import json, pathlib, sys
keys = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(keys["run_dir"])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "calls").open("a") as file:
    print(json.dumps(keys), file=file)
todo = folder.parent / "todo"
if todo.exists():
    status = int(todo.read_text())
    if folder.name == "distilled":
        todo.unlink()
        sys.exit(status)
record = {"step": 4, "samples_seen": 96, "train/step_time": 90.0, "val/seen/acc1": 0.5, "val/seen/acc5": 0.9}
(folder / "metrics.jsonl").write_text(json.dumps(record) + "\\n")
(folder / "DONE").write_text("96 samples in 4 steps\\n")
"""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN)
    return path


def called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object
) -> tuple[int, str]:
    """Exit status and output of `siglip-recipe`."""
    monkeypatch.setattr(sys, "argv", ["siglip-recipe", *map(str, arguments)])
    try:
        recipe.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_commands_of_the_stages(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    status, out = called(
        monkeypatch, capsys, chain, f"run_dir={tmp_path}/r", "global_batch_size=48", "samples=4.8e3", "optim.lr=1e-4",
        "fork:optim.lr=1e-5", "--dry-run",
    )  # fmt: skip
    assert status == 0
    base, distilled, fork = (shlex.split(line)[3:] for line in out.splitlines())
    assert base == [
        "experiment=quickstart", f"run_dir={tmp_path}/r/base", "global_batch_size=48", "optim.schedule_samples=4800",
        "total_samples=1920", "optim.lr=1e-4",
    ]  # fmt: skip
    assert f"init_from={tmp_path}/r/base" in distilled
    assert "checkpoint.keep_at_samples=[3840]" in distilled
    assert f"init_from={tmp_path}/r/distilled/checkpoints/step-00000080" in fork
    # that of the one stage comes later, and so holds
    assert fork[-2:] == ["optim.lr=1e-4", "optim.lr=1e-5"]
    assert "optim.lr=1e-5" not in distilled


def test_what_is_done_is_skipped_and_what_was_interrupted_goes_on(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    stand_in, run_dir = tmp_path / "stand_in.py", tmp_path / "r"
    stand_in.write_text(STANDS_IN)
    run_dir.mkdir()
    arguments = [chain, f"run_dir={run_dir}", "--launch", f"{sys.executable} {stand_in}"]

    def calls() -> list[int]:
        files = [run_dir / name / "calls" for name in ("base", "distilled", "fork")]
        return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]

    (run_dir / "todo").write_text("3")
    assert called(monkeypatch, capfd, *arguments)[0] == 3
    assert calls() == [1, 1, 0]
    # a signal ended it: status 0, but not at its end
    (run_dir / "todo").write_text("0")
    status, out = called(monkeypatch, capfd, *arguments)
    assert status == 1
    assert "stage base: done before" in out
    assert "stage distilled was stopped before its end; the same command goes on" in out
    assert calls() == [1, 2, 0]
    status, out = called(monkeypatch, capfd, *arguments)
    assert status == 0
    assert calls() == [1, 3, 1]
    assert (
        next(line for line in out.splitlines() if "seen/acc1 0.500" in line).split("│")[3].strip() == "done"
    )
    assert "0.03" in out, "90 s of a step"
    # other keys for one stage: it is asked again, and judges by itself
    assert called(monkeypatch, capfd, *arguments, "fork:optim.lr=1e-5")[0] == 0
    assert calls() == [1, 3, 2]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, ["siglip2_tinny", "run_dir=x"], "there is no recipe siglip2_tinny"),
        (None, [], "run_dir: none given"),
        (None, ["run_dir=x", "forc:optim.lr=1"], "forc: no such stage, did you mean fork?"),
        (None, ["run_dir=x", "nonsense"], "nonsense: give key=value"),
        (("at: 0.8", "at: 0.7"), ["run_dir=x"], "stage fork: at=0.7 must be among the keep"),
        (("start: base", "start: fork"), ["run_dir=x"], "stage distilled: start=fork is no earlier stage"),
        (("until: 0.4", "until: 1.4"), ["run_dir=x"], "stage base: until must be in 0..1"),
        (("experiment: quickstart", "experiments: quickstart"), ["run_dir=x"], "did you mean experiment?"),
        (("stages:", "stages: ["), ["run_dir=x"], "is not YAML"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    change: tuple[str, str] | None, arguments: list[str], message: str, chain: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    if change is not None:
        chain.write_text(CHAIN.replace(*change, 1))
    named = arguments if arguments[:1] == ["siglip2_tinny"] else [chain, *arguments]
    status, out = called(monkeypatch, capsys, *named)
    assert status == 2
    assert message in out
    assert len(out.splitlines()) == 1, out


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "conf/recipe").glob("*.yaml"))])
def test_every_recipe_is_of_experiments_that_compose(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    status, out = called(monkeypatch, capsys, name, "run_dir=runs/r", "--dry-run")
    assert status == 0
    for line in out.splitlines():
        arguments = shlex.split(line)[3:]
        config = composed(*arguments)
        keys = dict(argument.split("=", 1) for argument in arguments)
        assert config["total_samples"] == int(keys["total_samples"]) <= config["optim"]["schedule_samples"]
        if "init_from" in keys:
            # what a stage goes on from is taken whole, or its schedule would begin anew
            assert {"model", "optimizer", "position"} <= set(config["carry_over"])


def test_the_chain_that_the_readme_shows_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    blocks = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "conf/README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (shown,) = [block for block in blocks if "stages:" in block]
    (tmp_path / "chain.yaml").write_text(shown)
    status, out = called(monkeypatch, capsys, tmp_path / "chain.yaml", "run_dir=runs/chain", "--dry-run")
    assert status == 0, out
    for line in out.splitlines():
        composed(*shlex.split(line)[3:])


@pytest.mark.slow
def test_a_chain_that_is_stopped_and_continued_ends_as_one_that_is_not(
    chain: Path, small_run: list[str], tmp_path: Path
) -> None:
    keys = [
        key for key in small_run
        if not key.startswith(("experiment", "evaluation.", "total_samples", "global_batch_size"))
    ]  # fmt: skip
    keys.append("evaluation.tasks=null")
    command = [sys.executable, "-m", "siglip_train.recipe", str(chain), *keys]

    def run(run_dir: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, f"run_dir={run_dir}"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
        )

    straight, stopped = run(tmp_path / "straight"), tmp_path / "stopped"
    assert straight.wait(timeout=300) == 0
    assert straight.stdout.read().count(" done ") == 3
    first, log = run(stopped), stopped / "distilled" / "log.txt"
    deadline = time.monotonic() + 200
    # from here on it listens to signals, and ends at the first step
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=100) == 1
    assert not (stopped / "distilled/DONE").exists()
    again = run(stopped)
    assert again.wait(timeout=300) == 0
    for stage in ("base", "distilled", "fork"):
        assert losses(stopped / stage) == losses(tmp_path / "straight" / stage)
    assert sorted(losses(stopped / "fork")) == [9, 10]
    assert json.loads((stopped / "recipe.json").read_text()).keys() == {"base", "distilled", "fork"}
