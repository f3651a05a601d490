"""The folder of a run: agreed on by all ranks, kept to one run at a time, its config and its logs."""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import omegaconf

from siglip_train.distributed import flight_recorder
from siglip_train.distributed.collectives import broadcast_object
from siglip_train.distributed.setup import World
from siglip_train.errors import UserError
from siglip_train.files import write_text
from siglip_train.interop.runs import run_config
from siglip_train.rank_log import RankLog
from siglip_train.redact import redacted_values
from siglip_train.runtime import environment
from siglip_train.typed import flat

log = logging.getLogger("siglip_train")


def open_run_dir(wanted: str | None, world: World, values: dict[str, Any], rank_log: RankLog) -> Path:
    """Agree on the run's folder, create it, write config.yaml and environment.json, and start the logs. All ranks.

    wanted: null = a folder named by date and time. values: the composed config. Raises `UserError` on every rank where
    the folder cannot be written to, is another run's, or where a restart of the launcher would begin another folder.
    """
    if wanted is None:
        _refuse_a_folder_for_each_attempt(os.environ)
    wanted = wanted or datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S")
    run_dir = Path(broadcast_object(wanted))
    failure = None
    if world.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _claim(rank_log.open(run_dir), run_dir)
            _write_config(run_dir, {**values, "run_dir": str(run_dir)})
            write_text(run_dir / "environment.json", json.dumps(environment(), indent=1))
        except UserError as error:
            failure = str(error)
        except OSError as error:
            failure = f"run_dir: cannot write to {run_dir}: {error}"
    failure = broadcast_object(failure)
    if failure is not None:
        # it may be another run's, whose log is not the place to say so
        rank_log.forget()
        raise UserError(failure)
    if not world.is_main:
        try:
            rank_log.open(run_dir)
        except OSError as error:
            log.warning("rank %d has no log, as it cannot write to %s: %s", world.rank, run_dir, error)
    flight_recorder.write_into(run_dir / "logs")
    return run_dir


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
    try:
        fcntl.flock(to_file.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"run_dir: another process still trains in {run_dir}; wait for its end, or end it"
        ) from None
    except OSError as error:
        log.warning("run_dir: %s knows no locks (%s); take care that one run alone uses it", run_dir, error)


def _write_config(run_dir: Path, values: dict[str, Any]) -> None:
    """Write config.yaml, without secrets; where the run had one, say which keys have changed since."""
    values = redacted_values(values)
    path = run_dir / "config.yaml"
    if path.exists():
        before, after = flat(run_config(run_dir)), flat(values)
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                log.info(
                    "config changed since this run began: %s: %s -> %s", key, before.get(key), after.get(key)
                )
    write_text(path, omegaconf.OmegaConf.to_yaml(values))
