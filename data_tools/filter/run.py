"""A whole filtering run: what is there already, looking, deciding, writing, and the report of it all."""

import hashlib
import json
import shutil
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
from siglip_train.data.packing.run_record import alone_in, earlier_record, require_same
from siglip_train.data.processes import run_all
from siglip_train.data.progress import progress
from siglip_train.errors import UserError
from siglip_train.files.atomic import remove_leftovers, write_whole

# raise it whenever the same options would keep other samples
FILTER_VERSION = 2
# what was seen of each shard, while others are missing
_STATE = ".filter"


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
    record = {"generator": "filter", "made_with": made_with}
    present = earlier_record(out_dir, REPORT, "filter")
    if present is not None:
        require_same(out_dir, present.get("made_with", {}), made_with, "filtered")
        if "samples" in present:
            # the earlier run may have ended just before it could
            shutil.rmtree(out_dir / _STATE, ignore_errors=True)
            return present, False
    with alone_in(out_dir):
        # the record first: a folder without it is not known as ours
        write_whole(out_dir / REPORT, _json(record))
        state = out_dir / _STATE
        state.mkdir(exist_ok=True)
        remove_leftovers(state)
        remove_leftovers(out_dir)
        seen = _look(urls, state, options.wanted, cache, workers)
        rules = [rule.name for rule in criteria.rules]
        try:
            verdict = decide(seen, rules, options.joint, criteria.spec)
            if not verdict.stays.any():
                raise UserError(_nothing_left(verdict))
        except UserError:
            # so that other options may be tried with the same folder
            shutil.rmtree(state)
            (out_dir / REPORT).unlink()
            raise
        tasks = _plan(urls, out_dir, cache, seen, verdict)
        _write(tasks, workers)
        save_dropped(out_dir / DROPPED, urls, seen, verdict)
        report = {**record, **results(urls, seen, verdict, tasks)}
        write_whole(out_dir / REPORT, _json(report))
        shutil.rmtree(state)
        return report, True


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


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
