"""All shards: one a process, reports kept until the run is complete, and keys compared over shards."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_tools.processes import run_all
from data_tools.verify.checks import Rules, SampleChecks
from data_tools.verify.shard import Problem, ShardReport, ShardTask, sample_keys, split_digests, verify_shard
from siglip_train.data.locations import is_remote

# of kept reports: raise it when they hold something else
_FORMAT = 2


def verify_shards(
    urls: Sequence[str], rules: Rules, cache: Path, workers: int, advance: Callable[[int], None]
) -> list[ShardReport]:
    """The report of every shard, in the order given; `advance` is called with 1 for each.

    An interrupted run leaves its reports in `cache`; the same run goes on from there. Raises `UserError`.
    """
    # a wrong field or tokenizer is said here, once, and not by every process
    SampleChecks(rules)
    kept = _kept_file(urls, rules, cache)
    reports = _read_kept(kept)
    advance(sum(url in reports for url in urls))
    tasks = [ShardTask(url, cache, rules) for url in urls if url not in reports]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a", encoding="utf-8") as file:
        for report in run_all(verify_shard, tasks, workers):
            reports[report.url] = report
            file.write(json.dumps({"version": _version(report.url), **asdict(report)}) + "\n")
            file.flush()
            advance(1)
    ordered = [reports[url] for url in urls]
    _compare_keys(ordered, cache)
    kept.unlink(missing_ok=True)
    return ordered


def _kept_file(urls: Sequence[str], rules: Rules, cache: Path) -> Path:
    identity = json.dumps(
        [_FORMAT, list(urls), asdict(rules), [_version(url) for url in (rules.tokenizer,) if url]]
    )
    return cache / "verify" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.jsonl"


def _version(url: str) -> str:
    """Changes when a local file does."""
    if is_remote(url) or not Path(url).exists():
        return ""
    stat = Path(url).stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _read_kept(path: Path) -> dict[str, ShardReport]:
    reports = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            content = json.loads(line)
        except ValueError:
            # the line that was being written when the run ended
            continue
        version, problems = content.pop("version"), content.pop("problems")
        if version == _version(content["url"]):
            report = ShardReport(**content, problems=[Problem(*problem) for problem in problems])
            reports[report.url] = report
    return reports


def _compare_keys(reports: list[ShardReport], cache: Path) -> None:
    """Add a problem to every sample whose key an earlier shard has too."""
    digests = [np.frombuffer(split_digests(report.digests), dtype=np.uint64) for report in reports]
    values, counts = np.unique(np.concatenate([np.unique(each) for each in digests]), return_counts=True)
    shared = values[counts > 1]
    first: dict[str, ShardReport] = {}
    for report, own in zip(reports, digests, strict=True):
        (rows,) = np.nonzero(np.isin(own, shared))
        # names are read again for these alone: digests of 8 bytes may meet by chance, and all names fill a memory
        keys = sample_keys(report.url, cache) if len(rows) else []
        for row in rows.tolist():
            earlier = first.setdefault(keys[row], report)
            if earlier is not report:
                report.problems.append(
                    Problem(row, keys[row], "key in several shards", f"also in {earlier.name}")
                )
