"""The entry point of recipes: a chain of experiments, each a run that goes on from an earlier one."""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

from siglip_train.errors import UserError, exit_on_user_error
from siglip_train.files.atomic import read_text, write_text
from siglip_train.files.records import parse_record, read_records, to_json
from siglip_train.interop.runs import checkpoint_name
from siglip_train.typed import build, suggest

# of a stage's folder, as in any run's
_DONE = "DONE"
# beside the folders of the stages: with which command each was run to its end
_COMMANDS = "recipe.json"
# keys of the recipe itself, which stages are given
_WHOLE = ("samples", "global_batch_size")
# how many results of a stage the table has room for
_RESULTS = 3


@dataclass
class StageConfig:
    """A stage of a recipe.

    experiment: the name of its file. until: the share of the recipe's samples at which it ends.
    start: the stage it goes on from, None = from nothing. at: the share of the recipe's samples at which it leaves that
    one, None = at its end. keep: shares at which a checkpoint stays for ever, for stages that leave there.
    overrides: more keys.
    """

    experiment: str
    until: float = 1.0
    start: str | None = None
    at: float | None = None
    keep: list[float] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)


@dataclass
class RecipeConfig:
    """samples: pairs of the whole schedule. global_batch_size: of all stages. stages: by name, in order."""

    samples: int
    global_batch_size: int
    stages: dict[str, StageConfig]

    def __post_init__(self) -> None:
        """Check that stages go on from earlier ones, at places where these have a checkpoint."""
        earlier: dict[str, StageConfig] = {}
        for name, stage in self.stages.items():
            if not 0 < stage.until <= 1 or not all(0 < share < stage.until for share in stage.keep):
                raise ValueError(f"stage {name}: until must be in 0..1, and keep before it")
            if stage.start is not None and stage.start not in earlier:
                raise ValueError(f"stage {name}: start={stage.start} is no earlier stage")
            if stage.at is not None and (stage.start is None or stage.at not in earlier[stage.start].keep):
                raise ValueError(
                    f"stage {name}: at={stage.at} must be among the keep of the stage that it starts from"
                )
            earlier[name] = stage

    def samples_at(self, share: float) -> int:
        """So many samples of the schedule in whole global batches, which is where checkpoints can be."""
        return round(self.samples * share / self.global_batch_size) * self.global_batch_size


class Stage(NamedTuple):
    """A stage of one run of a recipe: its folder, and the arguments of `siglip-train`."""

    name: str
    experiment: str
    run_dir: Path
    arguments: list[str]


@exit_on_user_error
def main() -> None:
    """`siglip-recipe NAME run_dir=PATH [key=value …] [STAGE:key=value …]`."""
    options = _parser().parse_intermixed_args()
    if options.name is None:
        print("\n".join(f"{name:24} {title}" for name, title in _titles()))  # noqa: T201
        return
    recipe, keys = _recipe(options.name, options.overrides)
    stages = _stages(recipe, keys)
    if options.dry_run:
        print("\n".join(shlex.join([*options.launch, *stage.arguments]) for stage in stages))  # noqa: T201
        return
    try:
        for stage in stages:
            _run(stage, options.launch, keys.run_dir / _COMMANDS)
    finally:
        Console().print(_table(stages))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siglip-recipe",
        description="Run a chain of experiments, each in a folder of its own. Stages that are done are skipped, one "
        "that was interrupted is continued. Without NAME, list the recipes.",
    )
    parser.add_argument("name", nargs="?", help="of conf/recipe, or a file of your own (.yaml)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="run_dir=PATH, where the stages' folders lie; samples=, global_batch_size= of the whole; any key of "
        "siglip-train for all stages, or STAGE:key=value for one",
    )  # fmt: skip
    parser.add_argument(
        "--launch", type=shlex.split, default=[sys.executable, "-m", "siglip_train.train"], metavar="COMMAND",
        help="what starts a stage, by default one process: 'torchrun --nproc_per_node 8 -m siglip_train.train'",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the stages' commands alone")
    return parser


def _titles() -> Iterator[tuple[str, str]]:
    for path in sorted((Path(str(files("conf"))) / "recipe").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        yield path.stem, first.removeprefix("#").strip()


class _Keys(NamedTuple):
    """What the command line says: the folder, keys for all stages, and keys for one."""

    run_dir: Path
    common: list[str]
    own: dict[str, list[str]]


def _recipe(name: str, overrides: Sequence[str]) -> tuple[RecipeConfig, _Keys]:
    keys, whole = _split(name, overrides)
    path = Path(name) if name.endswith(".yaml") else Path(str(files("conf"))) / "recipe" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no recipe {name}{suggest(name, [known for known, _ in _titles()])}")
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected the keys samples, global_batch_size and stages")
    recipe = build(RecipeConfig, {**values, **whole}, path.name)
    if unknown := keys.own.keys() - recipe.stages.keys():
        raise UserError(f"{min(unknown)}: no such stage{suggest(min(unknown), recipe.stages)}")
    return recipe, keys


def _split(name: str, overrides: Sequence[str]) -> tuple[_Keys, dict[str, Any]]:
    """The command line's keys, and those of the recipe itself."""
    run_dir, whole = None, {}
    common: list[str] = []
    own: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        stage, colon, _ = key.partition(":")
        if not equals:
            raise UserError(f"{override}: give key=value, or STAGE:key=value for one stage")
        if key == "run_dir":
            run_dir = Path(value).expanduser()
        elif key in _WHOLE:
            whole[key] = yaml.safe_load(value)
        elif colon:
            own.setdefault(stage, []).append(override.partition(":")[2])
        else:
            common.append(override)
    if run_dir is None:
        raise UserError(
            f"run_dir: none given; the folder for those of the stages: siglip-recipe {name} run_dir=PATH"
        )
    return _Keys(run_dir, common, own), whole


def _stages(recipe: RecipeConfig, keys: _Keys) -> list[Stage]:
    found = []
    for name, config in recipe.stages.items():
        arguments = [
            f"experiment={config.experiment}", f"run_dir={keys.run_dir / name}",
            f"global_batch_size={recipe.global_batch_size}", f"optim.schedule_samples={recipe.samples_at(1)}",
            f"total_samples={recipe.samples_at(config.until)}",
        ]  # fmt: skip
        if config.keep:
            kept = ",".join(str(recipe.samples_at(share)) for share in config.keep)
            arguments.append(f"checkpoint.keep_at_samples=[{kept}]")
        if config.start is not None:
            source = keys.run_dir / config.start
            if config.at is not None:
                step = recipe.samples_at(config.at) // recipe.global_batch_size
                source = source / "checkpoints" / checkpoint_name(step)
            arguments.append(f"init_from={source}")
        arguments += [*config.overrides, *keys.common, *keys.own.get(name, ())]
        found.append(Stage(name, config.experiment, keys.run_dir / name, arguments))
    return found


def _run(stage: Stage, launch: Sequence[str], commands: Path) -> None:
    """Run a stage to its end, or return at once where it is done by the same command. Raises `UserError`."""
    done: dict[str, Any] = (
        (parse_record(commands.read_text(encoding="utf-8")) or {}) if commands.is_file() else {}
    )
    console = Console(stderr=True)
    if (stage.run_dir / _DONE).is_file() and done.get(stage.name) == stage.arguments:
        console.print(f"stage {stage.name}: done before", highlight=False)
        return
    command = [*launch, *stage.arguments]
    console.print(f"stage {stage.name}: {shlex.join(command)}", highlight=False, soft_wrap=True)
    status = _wait(command)
    if status != 0:
        # the stage has said why
        raise SystemExit(status if status > 0 else 128 - status)
    if not (stage.run_dir / _DONE).is_file():
        console.print(
            f"stage {stage.name} was stopped before its end; the same command goes on", highlight=False
        )
        raise SystemExit(1)
    write_text(commands, to_json({**done, stage.name: stage.arguments}, indent=1) + "\n")


def _wait(command: Sequence[str]) -> int:
    """The exit status of a command, which is told of the signals that ask this process to stop."""
    with subprocess.Popen(command) as process:

        def hand_on(number: int, _: FrameType | None) -> None:
            process.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            return process.wait()
        except KeyboardInterrupt:
            # a terminal has told it too
            return process.wait() or 130
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _table(stages: Sequence[Stage]) -> Table:
    """What came of each stage, from the files of its run."""
    table = Table("stage", "experiment", "state", "samples", "hours", "results")
    for stage in stages:
        records = read_records(stage.run_dir / "metrics.jsonl")
        is_done = (stage.run_dir / _DONE).is_file()
        state = "done" if is_done else "not begun" if not records else "stopped"
        samples = f"{records[-1]['samples_seen']:,}" if records else ""
        table.add_row(stage.name, stage.experiment, state, samples, _hours(records), _results(records))
    return table


def _hours(records: Sequence[dict[str, Any]]) -> str:
    """Time spent in steps: pauses between restarts do not count, nor do evaluations."""
    seconds, before = 0.0, None
    for record in records:
        if "train/step_time" in record:
            steps = record["step"] - before if before is not None and before < record["step"] else 1
            seconds += steps * (record["train/step_time"] or 0.0)
            before = record["step"]
    return f"{seconds / 3600:.2f}" if records else ""


def _results(records: Sequence[dict[str, Any]]) -> str:
    """The first few metrics of the last evaluation, one a task."""
    last: dict[str, Any] = next(
        (record for record in reversed(records) if any(key.startswith("val/") for key in record)), {}
    )
    by_task: dict[str, str] = {}
    for key, value in last.items():
        if key.startswith("val/") and isinstance(value, float):
            by_task.setdefault(key.split("/")[1], f"{key.removeprefix('val/')} {value:.3f}")
    return ", ".join([*by_task.values()][:_RESULTS])


if __name__ == "__main__":
    main()
