"""The program as its user runs it: train, kill, resume, stop, and mistakes answered in one line."""

import contextlib
import fcntl
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from siglip_train import train
from siglip_train.checkpoints.write import Progress
from siglip_train.config import Config
from siglip_train.data.tokenizer import TextRules
from siglip_train.interop.conversion import Request, convert
from siglip_train.interop.load import load_model
from siglip_train.interop.native import Description, write_export
from siglip_train.models.published import likeness
from siglip_train.settings.announcement import begins_unlearned
from siglip_train.settings.starting_point import fill
from siglip_train.typed import build
from tests.conftest import ROOT
from tests.faults.injected import at, die
from tests.forks import run_program, run_program_by_rank
from tests.models.small import small_model
from tests.tiers import one_in

MODULE = "siglip_train.train"
TRAIN = [sys.executable, "-m", MODULE]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(ranks: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
        "-m", MODULE,
    ]  # fmt: skip


def run(arguments: list[str], command: list[str] | None = None) -> subprocess.CompletedProcess:
    """`siglip-train` in a process that was forked with its imports done; a command begins from nothing."""
    if command is None:
        result = run_program(MODULE, arguments)
    else:
        result = subprocess.run(
            [*command, *arguments],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert "Traceback" not in result.stderr, result.stderr
    return result


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["train/loss"] for record in records(run_dir) if "train/loss" in record}


def data_counts(run_dir: Path) -> list[dict[str, float]]:
    """What each logged step says of samples, sources and languages."""
    found = [
        {name: value for name, value in record.items() if name.startswith("data/")}
        for record in records(run_dir)
    ]
    return [counts for counts in found if counts]


@pytest.fixture(scope="module")
def finished(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of ten steps on one rank."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = run([*small_run, f"run_dir={run_dir}"], TRAIN)
    assert result.returncode == 0, result.stderr
    return run_dir


def test_a_run_leaves_what_the_contract_names(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        "report.html",
        "environment.json",
    } <= names
    assert (finished / "checkpoints" / "LAST").read_text().strip() == "step-00000010"
    assert len(list((finished / "checkpoints").glob("step-*"))) == 2, "the newest two are kept"
    assert sorted(losses(finished)) == list(range(1, 11))
    first, last = records(finished)[0], records(finished)[-1]
    for name in ("lr", "sigmoid_loss", "logit_scale", "logit_bias", "grad_norm", "grad_norm_clipped",
                 "samples_per_second", "data_time", "exchange_time", "step_time", "memory_gib"):  # fmt: skip
        assert f"train/{name}" in first
    assert first["train/logit_bias"] == pytest.approx(-10, abs=0.1)
    assert {"val/seen/acc1", "val/unseen/acc1", "val/loss/loss"} <= last.keys()
    log = (finished / "log.txt").read_text()
    assert "model of its own sizes, 64 px: 0.1 M parameters, unlike any in conf/model" in log
    assert (
        "global_batch_size is 24 instead of 64: by the square-root rule, usual with Adam, optim.lr=0.000612 would go "
        "with it; 0.001 stays" in log
    )
    assert "sigmoid loss near" in log
    assert "source tiny: 600 samples in 4 shards, 100 % of the mix, 0.4 epochs in this run" in log
    counts = data_counts(finished)[-1]
    assert counts["data/passes/tiny"] == pytest.approx(240 / 600)
    assert counts["data/source/tiny"] == counts["data/seen"] == 240
    assert sum(count for name, count in counts.items() if name.startswith("data/language/")) == 240


def test_the_first_loss_is_the_expected_one(finished: Path) -> None:
    """Random unit embeddings: near 10 for the pair itself, next to nothing for 23 negatives (recipe §1.1)."""
    # before training all images are alike and all texts are, so the batch shares one cosine, of 32 dimensions
    spread = 10 / math.sqrt(32)
    assert losses(finished)[1] == pytest.approx(10.0, abs=2.5 * spread)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "stage", "workers", "by_torchrun"),
    [
        (2, 3, 0, False),
        pytest.param(3, 3, 0, False, marks=pytest.mark.slow),
        pytest.param(2, 2, 1, True, marks=pytest.mark.slow),
    ],
)
def test_several_ranks_train_as_one(
    finished: Path, small_run: list[str], tmp_path: Path, *, ranks: int, stage: int, workers: int,
    by_torchrun: bool,
) -> None:  # fmt: skip
    arguments = [*small_run, f"run_dir={tmp_path}", f"engine.zero_stage={stage}", f"data.workers={workers}"]
    result = run(arguments, torchrun(2)) if by_torchrun else run_program(MODULE, arguments, ranks=ranks)
    assert result.returncode == 0, result.stderr
    single = losses(finished)
    for step, loss in losses(tmp_path).items():
        assert loss == pytest.approx(single[step], rel=1e-4), f"step {step}"
    last, expected = records(tmp_path)[-1], records(finished)[-1]
    assert last["val/loss/loss"] == pytest.approx(expected["val/loss/loss"], rel=1e-3)
    # a checkpoint of any stage and number of ranks is a model to convert; keys' biases change nothing, and Adam makes
    # steps of their rounding errors
    convert(tmp_path, tmp_path / "converted", Request("native"))
    models = [load_model(path) for path in (tmp_path / "converted", finished)]
    with torch.inference_mode():
        texts = [m.model.encode_text(m.tokenize(["a red circle", "ein blauer Stern"])) for m in models]
    # measured 1.3e-7 on two ranks
    torch.testing.assert_close(*texts, rtol=0, atol=1e-4)


@pytest.mark.dist
def test_killed_at_a_random_step_it_resumes_with_the_same_losses(
    finished: Path, small_run: list[str], tmp_path: Path
) -> None:
    kill_at = random.Random(os.getpid()).randint(4, 8)
    process = subprocess.Popen(
        [*torchrun(2), *small_run, f"run_dir={tmp_path}"], cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(tmp_path, kill_at, process)
    kill_job(process)
    # one rank goes on where two were killed, at another ZeRO stage
    result = run([*small_run, f"run_dir={tmp_path}", "engine.zero_stage=3"])
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stderr
    single, resumed = losses(finished), losses(tmp_path)
    assert sorted(resumed) == sorted(single)
    assert len([record for record in records(tmp_path) if "train/loss" in record]) == len(single), (
        "no step twice"
    )
    for step, loss in resumed.items():
        assert loss == pytest.approx(single[step], rel=1e-4), f"killed at {kill_at}, step {step}"
    assert data_counts(tmp_path) == data_counts(finished)


def test_resumed_losses_are_identical(finished: Path, small_run: list[str], tmp_path: Path) -> None:
    arguments = [*small_run, f"run_dir={tmp_path}"]
    assert run([*arguments, "stop_after_steps=4"]).returncode == 0
    assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == "step-00000004"
    assert run(arguments).returncode == 0
    assert losses(tmp_path) == losses(finished)
    assert (tmp_path / "log.txt").read_text().count("sigmoid loss near") == 1, "of the beginning alone"
    (tmp_path / "config.yaml").write_text("model: [")
    damaged = run(arguments)
    assert damaged.returncode == 2
    assert f"error: cannot read {tmp_path / 'config.yaml'}" in damaged.stderr


def test_a_run_in_two_stages_has_the_losses_and_rates_of_one_also_where_the_second_is_killed(
    finished: Path, small_run: list[str], tmp_path: Path
) -> None:
    common = [each for each in small_run if not each.startswith(("evaluation.", "total_samples"))]
    common.append("evaluation.tasks=null")
    first = [*common, "total_samples=96", "optim.schedule_samples=240", f"run_dir={tmp_path}/first"]
    second = [*common, "total_samples=240", f"run_dir={tmp_path}/second", f"init_from={tmp_path}/first"]
    second.append("carry_over=[model,heads,objectives,optimizer,position]")
    assert run(first).returncode == 0
    assert (tmp_path / "first/DONE").read_text() == "96 samples in 4 steps\n"
    # behind the checkpoint of step 6
    (killed,) = run_program_by_rank(MODULE, second, ranks=1, prepare=partial(at, "data", 9, (0,), die))
    assert killed.returncode == -9, killed.stderr
    assert "position from" in killed.stderr
    assert not (tmp_path / "second/DONE").exists()
    resumed = run(second)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    assert (tmp_path / "second/DONE").read_text() == "240 samples in 10 steps\n"

    assert {**losses(tmp_path / "first"), **losses(tmp_path / "second")} == losses(finished)
    assert sorted(losses(tmp_path / "second")) == [5, 6, 7, 8, 9, 10]
    rates = {
        run_dir.name: [record["train/lr"] for record in records(run_dir) if "train/lr" in record]
        for run_dir in (finished, tmp_path / "first", tmp_path / "second")
    }
    assert rates["first"] + rates["second"] == rates["run"]
    assert min(rates["run"]) == rates["run"][-1], "the cosine ends with the second stage, not with the first"

    again = run(first)
    assert again.returncode == 0
    assert f"{tmp_path}/first is done, as its DONE says" in again.stderr
    assert "resuming" not in again.stderr
    longer = run([*first, "total_samples=144", "stop_after_steps=5"])
    assert longer.returncode == 0
    assert not (tmp_path / "first/DONE").exists(), "there is more to do now"


def test_micro_batches_change_no_loss_also_where_a_run_resumes_with_others(
    finished: Path, small_run: list[str], tmp_path: Path
) -> None:
    arguments = [*small_run, f"run_dir={tmp_path}", "evaluation.tasks.retrieval=null"]
    assert run([*arguments, "stop_after_steps=4", "micro_batch_size=8"]).returncode == 0
    assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == "step-00000004"
    resumed = run([*arguments, "micro_batch_size=6"])
    assert resumed.returncode == 0
    assert "config changed since this run began: micro_batch_size: 8 -> 6" in resumed.stderr
    single = losses(finished)
    assert sorted(losses(tmp_path)) == sorted(single)
    for step, loss in losses(tmp_path).items():
        assert loss == pytest.approx(single[step], rel=1e-5), f"step {step}"


# the other is sent in the test after this one
@pytest.mark.parametrize("name", one_in(2, ["SIGTERM", "SIGUSR1"]))
def test_a_signal_saves_at_the_next_step_and_leaves_cleanly(
    small_run: list[str], tmp_path: Path, name: str
) -> None:
    process = subprocess.Popen(
        [*TRAIN, *small_run, f"run_dir={tmp_path}", "total_samples=24000"], cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    step = int((tmp_path / "checkpoints" / "LAST").read_text().strip().removeprefix("step-"))
    assert step == max(losses(tmp_path))
    assert f"{name}: saving at step {step}" in errors


def test_a_signal_does_not_wait_for_the_end_of_an_evaluation(small_run: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*TRAIN, *small_run, f"run_dir={tmp_path}", "total_samples=24000", "evaluation.every_steps=2",
         "evaluation.batch_size=4"],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "SIGUSR1: leaving the evaluation, saving at step 2" in errors
    assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == "step-00000002"
    assert not [record for record in records(tmp_path) if "val/seen/acc1" in record]


def test_an_evaluation_that_fails_at_the_end_loses_no_step(small_run: list[str], tmp_path: Path) -> None:
    # the json member of a validation sample has no such field: seen by nobody before the end
    task = "{_target_: siglip_train.evals.retrieval.Retrieval, shards: data/tiny/validation/*.tar, text: json:nothing}"
    shards = next(each for each in small_run if "validation" in each).split("=", 1)[1]
    task = task.replace("data/tiny/validation/*.tar", f'"{shards}"')
    result = run(
        [*small_run, f"run_dir={tmp_path}/run", "checkpoint.every_steps=0", "stop_after_steps=2",
         f"+evaluation.tasks.broken={task}"]
    )  # fmt: skip
    assert result.returncode == 2
    assert "no usable" in result.stderr
    assert (tmp_path / "run" / "checkpoints" / "LAST").read_text().strip() == "step-00000002"


def test_bf16_stays_near_fp32(finished: Path, small_run: list[str], tmp_path: Path) -> None:
    arguments = ["precision=bf16", "stop_after_steps=4", "evaluation.tasks.retrieval=null"]
    result = run([*small_run, f"run_dir={tmp_path}", *arguments])
    assert result.returncode == 0, result.stderr
    measured, single = losses(tmp_path), losses(finished)
    assert measured != {step: single[step] for step in measured}, "it should have computed in bf16"
    # 2e-3 was measured
    for step, loss in measured.items():
        assert loss == pytest.approx(single[step], rel=2e-2)


def kill_job(process: subprocess.Popen) -> None:
    """SIGKILL the launcher and what it started, which are sessions of their own."""
    job = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in job:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(job)


def test_a_folder_in_which_another_process_trains_is_left_alone(small_run: list[str], tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        result = run([*small_run, f"run_dir={tmp_path}"])
    assert result.returncode == 2
    assert (
        result.stderr.strip().splitlines()[-1].startswith("error: run_dir: another process still trains in")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, f"it ended by itself: {process.stderr and process.stderr.read()}"
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in time")


def test_a_loss_that_is_not_finite_stops_with_rank_and_step(small_run: list[str], tmp_path: Path) -> None:
    result = run([*small_run, f"run_dir={tmp_path}", "optim.lr=1e30", "optim.clip_norm=1e30"])
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "finite on rank 0 at step" in message or "gradient norm at step" in message


def test_the_loss_of_initial_values_is_announced_where_scale_and_bias_have_them() -> None:
    tower = ("model.vision.position_table",)
    assert begins_unlearned(Progress())
    assert begins_unlearned(Progress(pretrained=tower))
    assert not begins_unlearned(Progress(pretrained=(*tower, "model.logit_scale", "model.logit_bias")))
    assert not begins_unlearned(Progress(step=3))


@pytest.fixture
def one_process() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_readmes_command_for_ones_own_shards_names_no_file_of_the_quickstart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = (
        (ROOT / "siglip_train" / "data" / "README.md").read_text().partition("## Train on your own shards")[2]
    )
    command = section.split("```")[1].replace("\\\n", " ")
    composed: list[dict] = []
    monkeypatch.setattr(train, "run", lambda values, written: composed.append(values))
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    train.main()
    config = build(Config, fill(composed[0]).values)
    web, other = config.data.sources.values()
    assert web.shards == "/data/web/{00000..41455}.tar"
    assert other.text == {"txt": 0.7, "json:title": 0.3}
    assert config.evaluation.tasks == {}
    assert "data/tiny" not in str(composed[0])
    assert config.total_samples == 400_000_000
    assert likeness(config.model) == ("SigLIP 2 B/16, 256 px", "as published")


def test_what_an_experiment_says_alone_is_known_beside_what_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also of an experiment in a folder of the user's."""
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\ndefaults: [quickstart, _self_]\nglobal_batch_size: 32\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    found: list[tuple] = []
    monkeypatch.setattr(train, "run", lambda values, written: found.append((values, written)))
    for arguments in ([f"--config-dir={tmp_path}", "experiment=mine"], []):
        monkeypatch.setattr(sys, "argv", ["siglip-train", *arguments, "global_batch_size=8"])
        train.main()
    (values, written), (_, none) = found
    assert (values["global_batch_size"], written["global_batch_size"], none) == (8, 32, None)


MISTAKES = {
    "unknown key": (["optim.lrr=1"], "optim.lrr"),
    "unknown experiment": (["experiment=nothing"], "nothing"),
    "unknown model": (["model=b17"], "did you mean b16?"),
    "not a number": (["optim.lr=fast"], "optim.lr: expected float, got 'fast'"),
    "not an integer": (["global_batch_size=2.5"], "global_batch_size: expected int, got 2.5"),
    "not a boolean": (["engine.compile_blocks=maybe"], "engine.compile_blocks: expected bool"),
    "batch of nothing": (["global_batch_size=0"], "global_batch_size: must be at least 1"),
    "micro-batch of nothing": (["micro_batch_size=0"], "micro_batch_size: must be at least 1 or null, got 0"),
    "micro-batches that leave a rest": (
        ["micro_batch_size=7"],
        "micro_batch_size: 7 does not divide the 24 pairs",
    ),
    "micro-batch above the batch": (
        ["micro_batch_size=48"],
        "micro_batch_size: 48 does not divide the 24 pairs",
    ),
    "half a micro-batch": (["micro_batch_size=2.5"], "micro_batch_size: expected int"),
    "no samples": (["total_samples=-5"], "total_samples: must be at least 1"),
    "warm-up longer than the run": (["optim.warmup_samples=240"], "leaves nothing of total_samples=240"),
    "learning rate of zero": (["optim.lr=0"], "lr must be above 0"),
    "betas out of range": (["optim.betas=[0.9,1.5]"], "betas must be two numbers in 0..1"),
    "rule that is no regex": (["optim.rules=[{pattern: '('}]"], "is not a regular expression"),
    "rule that covers nothing": (["optim.rules=[{pattern: visoin}]"], "covers no parameter"),
    "everything frozen": (["optim.rules=[{pattern: '.', frozen: true}]"], "nothing is left to train"),
    "zero stage 4": (["engine.zero_stage=4"], "engine.zero_stage: 4 is not one of 'auto', 0, 1, 2, 3"),
    "unknown precision": (["precision=fp8"], "precision: 'fp8' is not one of"),
    "keep no checkpoint": (["checkpoint.keep=0"], "keep must be at least 1"),
    "unknown wandb mode": (["log.wandb=maybe"], "log.wandb: 'maybe' is not one of"),
    "no tokenizer": (["tokenizer=nowhere/tokenizer.model"], "tokenizer: there is no nowhere/tokenizer.model"),
    "regions that no sample has": (
        ["+objective@objectives.captioning=captioning", "data.sources.tiny.regions=json:nothing"],
        "data.sources.tiny.regions: none of the first",
    ),
    "vocabulary too small": (["model.text.vocab_size=100"], "set model.text.vocab_size="),
    "no such shard": (["data.sources.tiny.shards=nowhere/*.tar"], "nowhere/*.tar"),
    "no source": (["~data.sources.tiny"], "data.sources: no source"),
    "unknown source key": (["data.sources.tiny.shard=x"], "data.sources.tiny.shard"),
    "negative weight": (["data.sources.tiny.weight=-1"], "weight"),
    "no objective": (["~objectives.sigmoid"], "objectives: none given"),
    "objective that does not exist": (
        ["objectives.sigmoid._target_=siglip_train.objectives.Nothing"],
        "objectives.sigmoid",
    ),
    "objective of weight zero": (["objectives.sigmoid.weight=0"], "weight"),
    "unknown exchange": (["objectives.sigmoid.exchange=tree"], "exchange is 'tree': choose auto, ring"),
    "grid without its size": (["objectives.sigmoid.exchange=grid"], "exchange is 'grid': choose auto, ring"),
    "unknown exchange dtype": (["objectives.sigmoid.exchange_dtype=fp8"], "choose fp32 or bf16"),
    "task with an unknown field": (["evaluation.tasks.seen.shard=x"], "evaluation.tasks.seen"),
    "task without its shards": (
        ["evaluation.tasks.loss.shards=nowhere/*.tar"],
        "evaluation.tasks.loss: no shard matches nowhere/*.tar",
    ),
    "task without its class names": (
        ["evaluation.tasks.seen.classnames=nowhere.txt"],
        "evaluation.tasks.seen: the class names: cannot read nowhere.txt",
    ),
    "width the heads do not divide": (["model.vision.heads=5"], "heads"),
    "image smaller than a patch": (["model.vision.image_size=4"], "image_size"),
    "resume from nowhere": (["resume=nowhere"], "resume: there is no nowhere"),
    "resume from what is no run": (["resume={tmp}"], "is neither a checkpoint nor a run"),
    "decay of weights that were not loaded": (
        ["optim.decay_pretrained=false"],
        "optim.decay_pretrained=false: it spares loaded weights, so init_from=PATH is needed",
    ),
    "carry over from no run": (
        ["carry_over=[model,position,optimizer]"],
        "carry_over: [model, position, optimizer] of no run; give init_from=RUN_DIR",
    ),
    "a schedule that ends before the run": (
        ["optim.schedule_samples=239"],
        "optim.schedule_samples=239 ends before total_samples=240",
    ),
    "init from nowhere": (["init_from=nowhere"], "init_from: there is no nowhere"),
    "batch larger than the data": (["global_batch_size=100000", "total_samples=200000"], "100000"),
    "cuda without a GPU": (["device=cuda"], "cuda"),
    "run_dir that is a file": (["run_dir={tmp}/file/run"], "run_dir"),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2(
    name: str,
    small_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    overrides, expected = MISTAKES[name]
    (tmp_path / "file").write_text("")
    run_dir = (
        [] if any(override.startswith("run_dir=") for override in overrides) else [f"run_dir={tmp_path}/run"]
    )
    overrides = [override.replace("{tmp}", str(tmp_path)) for override in overrides]
    monkeypatch.chdir(ROOT)
    message = mistake([*small_run, *run_dir, *overrides], monkeypatch, capsys)
    assert expected in message
    # the longest names all experiments
    assert len(message) < 800


def mistake(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """The one line of a command that ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["siglip-train", *arguments])
    with pytest.raises(SystemExit) as leaving:
        train.main()
    assert leaving.value.code == 2
    (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return message


@pytest.mark.usefixtures("one_process")
def test_a_run_that_would_read_texts_otherwise_than_its_start_is_told_what_to_set(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = small_model()
    rules = TextRules(strip_punctuation=True, pad="eos")
    write_export(tmp_path / "start", model.state_dict(), Description(model.config, rules=rules))
    message = mistake(
        [
            *small_run, f"run_dir={tmp_path}/run", f"init_from={tmp_path}/start",
            "text_rules.strip_punctuation=false", "text_rules.pad=pad",
        ],
        monkeypatch,
        capsys,
    )  # fmt: skip
    assert (
        "set text_rules.strip_punctuation=true text_rules.pad=eos model.text.context_length=5, or" in message
    )
