"""All shards: one a process, reports kept until the run is complete, and keys compared over shards."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.shared.result_cache import ResultCache, version
from data_tools.verify.checks import Rules, SampleChecks
from data_tools.verify.shard import Problem, ShardReport, ShardTask, sample_keys, split_digests, verify_shard

# of kept reports: raise it when they hold something else
_FORMAT = 4


def verify_shards(
    urls: Sequence[str], rules: Rules, cache: Path, workers: int, advance: Callable[[int], None]
) -> list[ShardReport]:
    """The report of every shard, in the order given; `advance` is called with 1 for each.

    An interrupted run leaves its reports in `cache`; the same run goes on from there. Raises `UserError`.
    """
    # a wrong field or tokenizer is said here, once, and not by every process
    SampleChecks(rules)
    kept = ResultCache(cache / "verify", _identity(urls, rules), _content, _report)
    reports = []
    results = kept.run(verify_shard, [ShardTask(url, cache, rules) for url in urls], workers)
    for url, report in zip(urls, results, strict=True):
        reports.append(replace(report, url=url))
        advance(1)
    _compare_keys(reports, cache)
    kept.forget()
    return reports


def _identity(urls: Sequence[str], rules: Rules) -> Any:
    return [_FORMAT, list(urls), asdict(rules), [version(path) for path in (rules.tokenizer,) if path]]


def _content(report: ShardReport) -> dict[str, Any]:
    # which may hold a secret
    return asdict(replace(report, url=""))


def _report(content: dict[str, Any]) -> ShardReport:
    problems = [Problem(*problem) for problem in content.pop("problems")]
    return ShardReport(**content, problems=problems)


def _compare_keys(reports: list[ShardReport], cache: Path) -> None:
    """Add a problem to every sample whose key an earlier shard has too."""
    digests = [np.frombuffer(split_digests(report.digests), dtype=np.uint64) for report in reports]
    values, counts = np.unique(np.concatenate([np.unique(each) for each in digests]), return_counts=True)
    shared = values[counts > 1]
    first: dict[str, ShardReport] = {}
    for report, own in zip(reports, digests, strict=True):
        # by sorting: numpy 2.0 looks for the range of numbers first, and that of these overflows
        (rows,) = np.nonzero(np.isin(own, shared, kind="sort"))
        # names are read again for these alone: digests of 8 bytes may meet by chance, and all names fill a memory
        keys = sample_keys(report.url, cache) if len(rows) else []
        for row in rows.tolist():
            earlier = first.setdefault(keys[row], report)
            if earlier is not report:
                report.problems.append(
                    Problem(row, keys[row], "key in several shards", f"also in {earlier.name}")
                )
