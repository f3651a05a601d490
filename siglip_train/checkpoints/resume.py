"""Chooses the checkpoint that a run resumes from: the newest one that is whole and the same on every rank."""

import logging
import socket
from functools import partial
from pathlib import Path
from typing import NamedTuple

from siglip_train.checkpoints.load import fault_of, has_manifest
from siglip_train.distributed.collectives import broadcast_object, gather_objects, on_main
from siglip_train.errors import UserError, said
from siglip_train.files.atomic import write_text
from siglip_train.files.manifest import fingerprint
from siglip_train.files.records import read_text
from siglip_train.interop.runs import LAST, checkpoints_in, last_checkpoint, step_of

log = logging.getLogger(__name__)

_ANEW = "to start a new run, give another run_dir, or move its checkpoints away"


class _Choice(NamedTuple):
    """Checkpoints that rank 0 finds, in the order in which they are tried. may_fall_back: whether to try the second."""

    candidates: list[Path]
    may_fall_back: bool = True


def choose_checkpoint(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to resume from as `resume` says, whole and alike on all ranks; None = the run begins. All ranks.

    `auto` takes the newest of `run_dir`, a path that checkpoint, or the newest of that run. Where one is damaged, the
    newest whole one before it is taken. Raises `UserError` on all ranks where there are checkpoints but none is whole,
    where one rank does not see what rank 0 sees, and where `null` would train over those that are there.
    """
    folder = run_dir / "checkpoints"
    candidates, may_fall_back = on_main(partial(_find, resume, run_dir))
    if not candidates:
        _refuse_if_seen(folder)
        return None
    damaged = []
    for candidate in candidates:
        fault = fault_on_any_rank(candidate)
        if fault is None:
            on_main(partial(_settle, candidate, folder))
            return candidate
        damaged.append((candidate, fault))
        if not may_fall_back:
            raise UserError(f"resume: the checkpoint {candidate} is damaged: {fault}; choose another")
        text = f"the checkpoint {candidate} is damaged: {fault}; the one before it is tried"
        on_main(partial(log.warning, text))
    listed = "; ".join(f"{path.name}: {fault}" for path, fault in damaged[:3])
    raise UserError(f"no checkpoint in {candidates[0].parent} is whole ({listed}): copy one back; {_ANEW}")


def fault_on_any_rank(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint on rank 0; None where it is whole and the same on every rank. All ranks."""
    expected = broadcast_object(_fingerprint(checkpoint))
    faults = gather_objects((socket.gethostname(), _fault(checkpoint, expected)))
    first, *others = (fault for _, fault in faults)
    differing = [rank for rank, fault in enumerate(others, start=1) if fault is not None]
    if first is None and differing:
        rank, more = differing[0], len(differing) - 1
        raise UserError(
            f"rank {rank} on {faults[rank][0]}{f' and {more} more' if more else ''} cannot resume as rank 0 does: "
            f"{faults[rank][1]}; all ranks must see the same files: put run_dir on a disk that the machines share, or "
            "copy it to each"
        )
    return first


def _fault(checkpoint: Path, expected: str | None) -> str | None:
    if not checkpoint.is_dir():
        return f"there is no {checkpoint.absolute()}"
    if _fingerprint(checkpoint) != expected:
        return f"{checkpoint.absolute()} holds other files there"
    return fault_of(checkpoint)


def _fingerprint(checkpoint: Path) -> str | None:
    try:
        return fingerprint(checkpoint)
    except OSError:
        return None


def _refuse_if_seen(folder: Path) -> None:
    """Raise a `UserError` if another rank sees checkpoints that rank 0 does not see. All ranks."""
    seen = gather_objects((socket.gethostname(), [path.name for path in checkpoints_in(folder)]))
    for rank, (host, names) in enumerate(seen):
        if names:
            raise UserError(
                f"rank {rank} on {host} sees checkpoints in {folder} ({names[0]}), and rank 0 does not: put run_dir on "
                f"a disk that the machines share, or copy it to each; {_ANEW}"
            )


def _settle(chosen: Path, folder: Path) -> None:
    """Make `chosen` the newest of its run by setting later checkpoints aside. Rank 0."""
    if not has_manifest(chosen):
        log.warning(
            "%s was saved by an earlier version, without digests: bits that flipped would not be seen", chosen
        )
    if chosen.parent.resolve() != folder.resolve():
        return
    try:
        for path in checkpoints_in(folder):
            if step_of(path) > step_of(chosen):
                path.rename(aside := _free_name(path))
                log.warning("%s is now %s; no run uses it, and it may be removed", path, aside.name)
        if last_checkpoint(folder) != chosen:
            write_text(folder / LAST, chosen.name + "\n")
    except OSError as error:
        log.warning("cannot set aside what is later than %s: %s", chosen, said(error))


def _free_name(path: Path) -> Path:
    names = (
        path.with_name(f"{path.name}.set-aside{suffix}")
        for suffix in ("", *(f"-{n}" for n in range(2, 1000)))
    )
    return next(name for name in names if not name.exists())


def _find(resume: str | None, run_dir: Path) -> _Choice:
    own = _newest_first(run_dir / "checkpoints")
    if resume == "auto":
        return _Choice(own)
    if resume is None:
        if own:
            raise UserError(
                f"run_dir: {run_dir} holds checkpoints ({own[0].name}), and resume=null would train over them: "
                f"resume=auto goes on from them; {_ANEW}"
            )
        return _Choice([])
    path = Path(resume)
    if not path.exists():
        raise UserError(f"resume: there is no {path}; resume=auto continues run_dir where it can")
    if own and not path.resolve().is_relative_to(run_dir.resolve()):
        log.info("%s has checkpoints of its own: the run goes on from them, not from %s", run_dir, path)
        return _Choice(own)
    if (path / "state.json").exists():
        return _Choice([path], may_fall_back=False)
    others = _newest_first(path / "checkpoints")
    if not others:
        raise UserError(f"resume: {path} is neither a checkpoint nor a run with one")
    return _Choice(others)


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first. LAST names an older one if the run was killed before it wrote LAST."""
    there = checkpoints_in(folder)
    if there and last_checkpoint(folder) != there[0]:
        named = read_text(folder / LAST).strip().strip("\0") or "nothing"
        log.warning(
            "%s names %s, and %s is later: it is taken where it is whole", folder / LAST, named, there[0].name
        )
    return there
