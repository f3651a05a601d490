"""Opens the folder of a run on all ranks, keeps other runs out of it, and writes its config and tokenizer."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import omegaconf

from siglip_train.distributed import flight_recorder
from siglip_train.distributed.collectives import broadcast_object, on_main
from siglip_train.distributed.setup import World
from siglip_train.errors import UserError
from siglip_train.files.atomic import put_folder, write_text
from siglip_train.files.lock import lock_if_possible
from siglip_train.files.records import read_text
from siglip_train.interop.native import copy_tokenizer
from siglip_train.interop.runs import run_config
from siglip_train.redact import redacted_values
from siglip_train.runtime import environment
from siglip_train.supervision.rank_log import RankLog
from siglip_train.typed import flat

log = logging.getLogger("siglip_train")

T = TypeVar("T")

# in the folder of a run that has seen all of its samples
_DONE = "DONE"


def open_run_dir(wanted: str | None, world: World, rank_log: RankLog) -> Path:
    """Agree on the run's folder, create it, write environment.json, and start the logs. All ranks.

    wanted: null = a folder named by date and time. Raises `UserError` on every rank where the folder cannot be written
    to, is another run's, or where a restart of the launcher would begin another folder.
    """
    if wanted is None:
        _refuse_a_folder_for_each_attempt(os.environ)
    wanted = wanted or datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S")
    run_dir = Path(broadcast_object(wanted))

    def begin() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        _refuse_links(run_dir)
        _claim(rank_log.open(run_dir), run_dir)
        write_text(run_dir / "environment.json", json.dumps(environment(), indent=1))

    try:
        on_main(lambda: _written(begin, run_dir))
    except UserError:
        # it may be another run's, whose log is not the place to say so
        rank_log.forget()
        raise
    if not world.is_main:
        try:
            rank_log.open(run_dir)
        except OSError as error:
            log.warning("rank %d has no log, as it cannot write to %s: %s", world.rank, run_dir, error)
    flight_recorder.write_into(run_dir / "logs")
    return run_dir


def _written(work: Callable[[], T], run_dir: Path) -> T:
    try:
        return work()
    except OSError as error:
        raise UserError(f"run_dir: cannot write to {run_dir}: {error}") from None


def _refuse_links(run_dir: Path) -> None:
    """Raise `UserError` where what is appended to is a link: a stranger's could lead to any file of the user."""
    for name in ("log.txt", "metrics.jsonl", "logs"):
        if (run_dir / name).is_symlink():
            raise UserError(
                f"run_dir: {run_dir / name} is a link, and a run writes to no other folder; remove it"
            )


def _refuse_a_folder_for_each_attempt(variables: Mapping[str, str]) -> None:
    what = None
    if int(variables.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0:
        what = "torchrun --max-restarts starts the run again after a failure"
    elif int(variables.get("SLURM_RESTART_COUNT") or 0) > 0:
        what = "Slurm has put this job back into the queue"
    if what is not None:
        raise UserError(
            f"run_dir: {what}, and without run_dir each attempt would begin anew in a folder named by the time; give "
            "run_dir=PATH, and a restart goes on from its newest checkpoint"
        )


def _claim(to_file: logging.FileHandler, run_dir: Path) -> None:
    """Keep other runs out of the folder for as long as this process lives: ranks can outlive a killed launcher."""
    assert to_file.stream is not None, "it opens its file at once"
    if not lock_if_possible(to_file.stream, run_dir):
        raise UserError(f"run_dir: another process still trains in {run_dir}; wait for its end, or end it")


def write_done(run_dir: Path, *, samples: int, steps: int) -> None:
    """Write DONE: scripts wait for it, and a run that is started again ends at once. Raises `OSError`."""
    write_text(run_dir / _DONE, f"{samples} samples in {steps} steps\n")


def read_done(run_dir: Path) -> tuple[int, int]:
    """Samples and steps that DONE names; 0 where there is none. All ranks."""
    found = re.match(r"(\d+) samples in (\d+) steps", on_main(lambda: read_text(run_dir / _DONE)))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def forget_done(run_dir: Path) -> None:
    """Remove DONE, as the run goes on: from an earlier checkpoint, or to a larger total_samples. All ranks."""
    on_main(lambda: _written(lambda: (run_dir / _DONE).unlink(missing_ok=True), run_dir))


def earlier_config(run_dir: Path) -> dict[str, Any]:
    """The config with which the run was started last; {} of a new one. All ranks."""
    return on_main(lambda: _read_config(run_dir))


def write_config(run_dir: Path, values: dict[str, Any]) -> None:
    """Write config.yaml, without secrets; where the run had one, say which keys have changed since. All ranks."""
    values = {**values, "run_dir": str(run_dir)}
    on_main(lambda: _written(lambda: _write_config(run_dir, values), run_dir))


def _read_config(run_dir: Path) -> dict[str, Any]:
    return run_config(run_dir) if (run_dir / "config.yaml").exists() else {}


def _write_config(run_dir: Path, values: dict[str, Any]) -> None:
    values = redacted_values(values)
    before, after = flat(_read_config(run_dir)), flat(values)
    for key in sorted(before.keys() | after.keys()) if before else ():
        if before.get(key) != after.get(key):
            log.info(
                "config changed since this run began: %s: %s -> %s", key, before.get(key), after.get(key)
            )
    write_text(run_dir / "config.yaml", omegaconf.OmegaConf.to_yaml(values))


def kept_tokenizer(run_dir: Path, tokenizer: str) -> Path:
    """The run's own copy of its tokenizer, made now: the file may be gone at the next checkpoint. All ranks."""
    source, folder = Path(tokenizer), run_dir / "tokenizer"

    def keep() -> Path:
        if folder in (source, *source.parents):
            return source
        partial = folder.with_name(".tokenizer.partial")
        for leftover in (partial, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        name = copy_tokenizer(source, partial)
        put_folder(partial, folder)
        return folder / name

    return on_main(lambda: _written(keep, run_dir))
