"""One shard, from the tar around the samples to the last pixel: the task of one process."""

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.reading import plain_detail
from data_tools.verify.checks import Rules, SampleChecks
from siglip_train.data.faults import BadSample
from siglip_train.data.locations import is_remote, local_tar, was_damaged
from siglip_train.data.shards import RawSample, short_name
from siglip_train.data.tar import BrokenTarError, TarIndex, scan
from siglip_train.errors import UserError

WHOLE_SHARD = -1
_BLOCK = 512
_DIGEST_BYTES = 8


class Problem(NamedTuple):
    """A fault found: `row` is the number of its sample in the shard, `WHOLE_SHARD` what no sample can answer for."""

    row: int
    key: str
    cause: str
    detail: str


class ShardTask(NamedTuple):
    """Which shard, by which rules; cache: where downloads are."""

    url: str
    cache: Path
    rules: Rules


@dataclass
class ShardReport:
    """What was found in a shard.

    bytes, sha256: of the file, or of the unpacked copy of a remote shard; 0 and "" where it cannot be had.
    digests: 8 bytes of each sample's key in hex, so that millions of keys can be compared over shards.
    """

    url: str
    bytes: int = 0
    sha256: str = ""
    samples: int = 0
    problems: list[Problem] = field(default_factory=list)
    digests: str = ""

    @property
    def name(self) -> str:
        """The file name, as it stands in messages."""
        return short_name(self.url)

    @property
    def bad_samples(self) -> int:
        """How many samples have a problem, or several."""
        return len({problem.row for problem in self.problems if problem.row != WHOLE_SHARD})

    @property
    def whole_problems(self) -> int:
        """How many problems the shard has as a whole."""
        return sum(problem.row == WHOLE_SHARD for problem in self.problems)


@dataclass
class _Sample:
    """The members of one key (extension -> number in the index), together or apart; fault: (cause, detail)."""

    key: str
    members: dict[str, int]
    fault: tuple[str, str] | None = None


def verify_shard(task: ShardTask) -> ShardReport:
    """Open every sample of a shard. Raises `UserError` only for rules that are none."""
    checks = _checks(task.rules)
    report = ShardReport(task.url)
    try:
        path = local_tar(task.url, task.cache)
        _identify(report, path if is_remote(task.url) else Path(task.url))
        # not from the cache of indexes: damage need not change size or time of a file
        index = scan(path)
    except (UserError, BrokenTarError, OSError) as error:
        report.problems.append(Problem(WHOLE_SHARD, "", "broken tar", str(error)))
        return report
    samples = _gather(index)
    report.samples = len(samples)
    report.digests = "".join(_digest(sample.key) for sample in samples)
    report.problems.extend(_shard_problems(path, index))
    with path.open("rb") as file:
        for row, sample in enumerate(samples):
            raw, whole = _read(file.fileno(), index, sample, report.name)
            if not whole:
                report.problems.append(Problem(row, sample.key, "broken header", "its checksum is wrong"))
            report.problems.extend(_sample_problems(checks, row, sample, raw))
    return report


def sample_keys(url: str, cache: Path) -> list[str]:
    """The key of every row of a shard that `verify_shard` could read."""
    return [sample.key for sample in _gather(scan(local_tar(url, cache)))]


def split_digests(digests: str) -> bytes:
    """The digests of a report as bytes, 8 a sample."""
    return bytes.fromhex(digests)


# one process has many shards and one tokenizer
@functools.lru_cache(1)
def _checks(rules: Rules) -> SampleChecks:
    return SampleChecks(rules)


def _identify(report: ShardReport, file: Path) -> None:
    with file.open("rb") as stream:
        report.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        report.bytes = stream.tell()


def _digest(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _gather(index: TarIndex) -> list[_Sample]:
    """The samples in order; members that stand apart from others of their key join the sample they belong to."""
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}
    for row in range(len(index)):
        key, members = index.key(row), index.members(row)
        earlier = latest.get(key)
        if earlier is not None and not earlier.members.keys() & members.keys():
            apart = f"{', '.join(members)} stand apart from {', '.join(earlier.members)}"
            earlier.fault = earlier.fault or ("out of order", apart)
            earlier.members.update(members)
            continue
        fault = ("duplicate key", "a sample of this key came before") if earlier is not None else None
        latest[key] = _Sample(key, members, fault)
        samples.append(latest[key])
    return samples


def _read(descriptor: int, index: TarIndex, sample: _Sample, shard: str) -> tuple[RawSample, bool]:
    """(the sample, are the headers before its members whole?)"""
    members, whole = {}, True
    for extension, member in sample.members.items():
        size, offset = int(index.sizes[member]), int(index.offsets[member])
        data = os.pread(descriptor, _BLOCK + size, offset - _BLOCK)
        whole = whole and _is_whole(data[:_BLOCK])
        members[extension] = data[_BLOCK:]
    return RawSample(shard, sample.key, members), whole


def _is_whole(header: bytes) -> bool:
    """Does the checksum fit, its own field taken as spaces, bytes as signed (old tars) or unsigned?"""
    rest = header[:148] + header[156:]
    try:
        stored = int(header[148:156].split(b"\0")[0], 8)
    except ValueError:
        return False
    total = sum(rest) + 8 * ord(" ")
    return stored == total or stored == total - 256 * sum(byte > 127 for byte in rest)


def _sample_problems(checks: SampleChecks, row: int, sample: _Sample, raw: RawSample) -> Iterator[Problem]:
    if sample.fault is not None:
        yield Problem(row, sample.key, *sample.fault)
    try:
        faults = checks.faults(raw)
    except Exception as error:  # a sample that no one foresaw must not end the run
        bad = BadSample.of(raw.shard, raw.key, error)
        yield Problem(row, raw.key, bad.cause, plain_detail(bad.detail))
        return
    for fault in faults:
        yield Problem(row, raw.key, fault.cause, plain_detail(fault.detail))


def _shard_problems(path: Path, index: TarIndex) -> Iterator[Problem]:
    """What is wrong around the samples; the first cause found, since one damage shows in many ways."""
    if len(index.torn):
        for key in index.torn.tolist():
            yield Problem(WHOLE_SHARD, key, "truncated", "the shard ends, or turns into rubbish, inside it")
    elif was_damaged(path):
        yield Problem(WHOLE_SHARD, "", "truncated", "the gzip stream is damaged")
    elif not len(index):
        yield Problem(WHOLE_SHARD, "", "empty shard", "no sample")
    else:
        yield from _end_problems(path, index)


def _end_problems(path: Path, index: TarIndex) -> Iterator[Problem]:
    """A tar ends with a block of zeros, and nothing follows it."""
    end = int((index.offsets + index.sizes).max())
    with path.open("rb") as file:
        file.seek(-(-end // _BLOCK) * _BLOCK)
        used = (bool(block.strip(b"\0")) for block in iter(lambda: file.read(_BLOCK), b""))
        # members that belong to no sample, such as hidden files, may stand before the mark
        if all(used):
            detail = "no mark of the end: whole samples may be missing"
            yield Problem(WHOLE_SHARD, index.key(len(index) - 1), "truncated", detail)
        elif any(used):
            yield Problem(
                WHOLE_SHARD, "", "data after the end", "tars joined by cat? readers stop at the first end"
            )
