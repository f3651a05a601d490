"""A whole filtering run: what is there already, looking, deciding, writing, and the report of it all."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.filter.decide import Joint, Verdict, decide
from data_tools.filter.look import Criteria, LookTask, Seen, Wanted, look_at_shard
from data_tools.filter.report import DROPPED, REPORT, results, save_dropped
from data_tools.filter.write import WriteTask, write_shard
from data_tools.shared.result_cache import shards_identity
from data_tools.shared.unfinished_run import UnfinishedRun
from siglip_train.data.processes import run_all
from siglip_train.data.progress import progress
from siglip_train.errors import UserError

# raise it whenever the same options would keep other samples
FILTER_VERSION = 2


@dataclass(frozen=True)
class FilterOptions:
    """What decides which samples stay, beside the shards."""

    wanted: Wanted
    joint: Joint = field(default_factory=Joint)

    def flat(self) -> dict[str, Any]:
        """Every option that is set, and a fingerprint of the files that options name."""
        rules = asdict(self.wanted.rules)
        files = {name: path for name, path in
                 (("keep_list", rules["keep_list"]), ("drop_list", rules["drop_list"]), ("balance", self.wanted.spec))
                 if path is not None}  # fmt: skip
        given = {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in rules.items()},
            "headers_only": self.wanted.headers_only,
            "dedup_images": self.joint.image_bits,
            "dedup_texts": self.joint.text_repeats,
            "balance": self.wanted.spec,
            "balance_as": ("weights" if self.joint.weigh else "subsample") if self.wanted.spec else None,
        }
        for name, path in files.items():
            given[f"{name}_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]
        return given


def filter_shards(
    urls: Sequence[str], out_dir: Path, options: FilterOptions, cache: Path, workers: int = 1
) -> tuple[dict[str, Any], bool]:
    """Filter shards into `out_dir`, or go on where a run was interrupted; (report, was there anything to do?).

    cache: where downloads are. The bytes depend on the shards and the options alone. Raises `UserError`, also where
    `out_dir` holds something else or was made with other options, and where no sample stays, which leaves it empty.
    """
    criteria = Criteria(options.wanted)
    made_with = {"version": FILTER_VERSION, **options.flat(), **shards_identity(urls)}
    run = UnfinishedRun(out_dir, REPORT, "filter", made_with, "filtered")
    if (present := run.finished()) is not None:
        return present, False
    with run.alone():
        seen = _look(urls, run.state, options.wanted, cache, workers)
        rules = [rule.name for rule in criteria.rules]
        try:
            verdict = decide(seen, rules, options.joint, criteria.spec)
            if not verdict.stays.any():
                raise UserError(_nothing_left(verdict))
        except UserError:
            run.forget()
            raise
        tasks = _plan(urls, out_dir, cache, seen, verdict)
        _write(tasks, workers)
        save_dropped(out_dir / DROPPED, urls, seen, verdict)
        return run.finish(results(urls, seen, verdict, tasks)), True


def _look(urls: Sequence[str], state: Path, wanted: Wanted, cache: Path, workers: int) -> list[Seen]:
    tasks = [LookTask(url, cache, wanted, state / f"{number:05d}.npz") for number, url in enumerate(urls)]
    left = [task for task in tasks if not task.target.exists()]
    if left:
        with progress(len(left), "looking at", "looked at", "shards") as advance:
            for _ in run_all(look_at_shard, left, workers):
                advance(1)
    return [Seen.load(task.target) for task in tasks]


def _plan(
    urls: Sequence[str], out_dir: Path, cache: Path, seen: Sequence[Seen], verdict: Verdict
) -> list[WriteTask]:
    """A shard for each that keeps a sample, numbered without gaps."""
    tasks: list[WriteTask] = []
    start = 0
    for url, part in zip(urls, seen, strict=True):
        rows = np.flatnonzero(verdict.stays[start : start + len(part.keys)])
        if len(rows):
            weights = None if verdict.weights is None else verdict.weights[start + rows]
            tasks.append(WriteTask(url, cache, out_dir / f"{len(tasks):05d}.tar", rows, weights))
        start += len(part.keys)
    return tasks


def _write(tasks: Sequence[WriteTask], workers: int) -> None:
    # a shard has its name when it is complete
    left = [task for task in tasks if not task.path.exists()]
    if left:
        with progress(len(left), "writing", "wrote", "shards") as advance:
            for count in run_all(write_shard, left, workers):
                advance(count)


def _nothing_left(verdict: Verdict) -> str:
    counts = [f"{name} drops {each}" for name, each in zip(verdict.names, verdict.each, strict=True) if each]
    return f"no sample is left of {len(verdict.first)}: {', '.join(counts) or 'the shards are empty'}"
