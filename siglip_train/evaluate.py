"""The entry point of evaluation: any checkpoint or published model, the tasks of a config, a table and a JSON file."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from siglip_train.composition import instantiate_all, plain, run_hydra
from siglip_train.data.workers import Workers, worker_count
from siglip_train.distributed.collectives import any_rank, barrier
from siglip_train.distributed.setup import DistributedConfig, init_world, leave_world
from siglip_train.errors import UserError, exit_on_user_error
from siglip_train.evals.base import (
    Encoder,
    Evaluation,
    Evaluator,
    check_all,
    flat_metrics,
    run_all,
    write_evaluations,
)
from siglip_train.evals.benchmark import benchmark_results, write_benchmark_results
from siglip_train.evals.table import left_out, result_tables
from siglip_train.files.atomic import write_text
from siglip_train.files.records import to_json
from siglip_train.interop.load import load_model
from siglip_train.interop.runs import read_heads, run_config
from siglip_train.report import write_evaluation_report, write_report
from siglip_train.settings.keys import print_keys
from siglip_train.settings.trust import check_read_back
from siglip_train.supervision.watch import Supervision, supervised
from siglip_train.typed import build


@dataclass
class EvaluateConfig:
    """Everything `siglip-eval` takes.

    checkpoint: a run, a checkpoint, an export, or a model of another library. tasks: what to measure, by names of your
    own; each has a `_target_`, which class it is, and that one's keys; usually from `evaluation=NAME`, and left empty,
    a run's own. tokenizer: in place of the model's, or for one that brings none. device: auto = a GPU where there is
    one. precision: auto = bf16 on a GPU, fp32 on a CPU. batch_size: rows that a rank embeds at once. workers: processes
    of a rank that read and decode; auto = the cores that a rank has, at most 12.
    output: where the JSON goes, with a report in HTML beside it (a run has its own); null = `evaluation.json` in the
    checkpoint's folder. benchmark_dir: a folder for a file each task and language, in CLIP_benchmark's form.
    trusted_packages: packages that a run's own tasks may name besides this project's evaluators; importing one runs it.
    allow_pipe: a run's own tasks may run commands (`pipe:`); those of the command line always may.
    """

    checkpoint: str
    tasks: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    batch_size: int = 64
    workers: Workers = "auto"
    output: str | None = None
    benchmark_dir: str | None = None
    trusted_packages: list[str] = field(default_factory=list)
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.batch_size < 1 or worker_count(self.workers) < 0:
            raise ValueError("batch_size must be at least 1 and workers must not be negative")


@exit_on_user_error
def main() -> None:
    """`siglip-eval checkpoint=PATH [evaluation=NAME] [key=value …]`, or `siglip-eval --keys [PREFIX]`."""
    if print_keys(EvaluateConfig, sys.argv[1:]):
        return
    run_hydra(
        lambda raw, _: run(plain(raw)),
        config_name="evaluate",
        config_class=EvaluateConfig,
        open_groups=("tasks.",),
    )


def run(values: dict[str, Any]) -> None:
    """Evaluate as the composed config `values` says. All ranks."""
    config = build(EvaluateConfig, values)
    nodes = config.tasks or _tasks_of_run(config)
    tasks = instantiate_all(nodes, "tasks")
    output = _writable_output(config)
    check_all(tasks, "tasks")
    _make_benchmark_dir(config)
    with supervised(DistributedConfig(), None) as watch:
        _evaluate(config, tasks, output, watch)


def _evaluate(config: EvaluateConfig, tasks: dict[str, Evaluator], output: Path, watch: Supervision) -> None:
    world = init_world(config.device, met=watch.met)
    loaded = load_model(config.checkpoint, device=str(world.device), tokenizer=config.tokenizer)
    encoder = Encoder(
        model=loaded.model,
        tokenizer=loaded.tokenize,
        transform=loaded.transform,
        world=world,
        precision=_precision(config.precision, world.device),
        batch_size=config.batch_size,
        workers=worker_count(config.workers),
        on_batch=watch.standing.move,
        heads={name: head.to(world.device) for name, head in read_heads(Path(config.checkpoint)).items()},
        captioner=lambda: loaded.captioner.on_ranks(any_rank),
    )
    evaluations = run_all(tasks, encoder)
    if world.is_main:
        report = _write(output, config, tasks, evaluations)
        console = Console()
        console.print(result_tables(evaluations), soft_wrap=True)
        console.print(left_out(evaluations), soft_wrap=True)
        console.print(f"written to {output}, report: {report}", soft_wrap=True)
    barrier()
    leave_world()


def _tasks_of_run(config: EvaluateConfig) -> dict[str, Any]:
    """Read the tasks that a run evaluated itself with, for a command that names none; the run may be a stranger's."""
    checkpoint = _existing(config)
    evaluation = run_config(checkpoint).get("evaluation") if (checkpoint / "config.yaml").is_file() else None
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    if not tasks or not isinstance(tasks, dict):
        raise UserError(
            f"nothing to evaluate: give evaluation=NAME (a file of conf/evaluation); {checkpoint} brings no tasks"
        )
    check_read_back(
        tasks,
        "evaluation.tasks",
        where=str(checkpoint / "config.yaml"),
        trusted_packages=config.trusted_packages,
        allow_pipe=config.allow_pipe,
    )
    return tasks


def _existing(config: EvaluateConfig) -> Path:
    checkpoint = Path(config.checkpoint)
    if not checkpoint.exists():
        raise UserError(f"checkpoint: there is no {checkpoint}")
    return checkpoint


def _writable_output(config: EvaluateConfig) -> Path:
    """Find out before an hour of evaluation, not after it, whether the result can be written."""
    checkpoint = _existing(config)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    output = Path(config.output) if config.output else folder / "evaluation.json"
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"output: cannot write {output}; give output=FILE.json in a folder that exists")
    if output == _report_beside(output):
        raise UserError(f"output: {output} is where the report goes; give output=FILE.json for the numbers")
    return output


def _report_beside(output: Path) -> Path:
    return output.with_suffix(".html")


def _make_benchmark_dir(config: EvaluateConfig) -> None:
    """Make the folder of `benchmark_dir` at once, for the same reason."""
    if config.benchmark_dir is None:
        return
    folder = Path(config.benchmark_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"benchmark_dir: cannot make {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"benchmark_dir: cannot write into {folder}")


def _precision(wanted: str, device: torch.device) -> Literal["bf16", "fp32"]:
    if wanted == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return "bf16" if wanted == "bf16" else "fp32"


def _write(
    output: Path, config: EvaluateConfig, tasks: dict[str, Evaluator], evaluations: dict[str, Evaluation]
) -> Path:
    """Write everything, and give the path of the report."""
    checkpoint = Path(config.checkpoint)
    results = benchmark_results(
        tasks, evaluations, model=checkpoint.resolve().name, pretrained=config.checkpoint
    )
    content = {"checkpoint": config.checkpoint, "metrics": flat_metrics(evaluations), "results": results}
    write_text(output, to_json(content, indent=1) + "\n")
    if config.benchmark_dir is not None:
        write_benchmark_results(Path(config.benchmark_dir), results)
    if (checkpoint / "checkpoints").is_dir():
        write_evaluations(checkpoint / "evaluations", evaluations)
        return write_report(checkpoint)
    sections = {task: evaluation._asdict() for task, evaluation in evaluations.items()}
    return write_evaluation_report(_report_beside(output), checkpoint.resolve().name, sections)


if __name__ == "__main__":
    main()
