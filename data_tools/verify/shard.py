"""One shard, from the tar around the samples to the last pixel: the task of one process."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.verify.checks import Rules, SampleChecks
from siglip_train.data.remote.cache import local_tar, was_damaged
from siglip_train.data.remote.locations import is_remote
from siglip_train.data.shards.faults import BadSample, plain_detail
from siglip_train.data.shards.manifest import left_out_of, members_of
from siglip_train.data.shards.reader import RawSample, short_name
from siglip_train.data.shards.scan import REPEATED_MEMBER, scan
from siglip_train.data.shards.tar import TarIndex, member_for_tools
from siglip_train.data.shards.tar_members import AFTER_THE_END, BLOCK, BROKEN_HEADER, SPARSE, BrokenTarError
from siglip_train.errors import UserError

WHOLE_SHARD = -1
_DIGEST_BYTES = 8
# damage of the tar that one sample answers for
_OF_A_SAMPLE = {
    BROKEN_HEADER: "its checksum, or its long name, is wrong",
    SPARSE: "its list of parts is in a form that is not read: make the tar without --sparse",
    REPEATED_MEMBER: "two of its members have one name: one may belong to another sample",
}
# damage whose end no one knows
_OF_THE_SHARD = {
    AFTER_THE_END: "tars joined by cat? readers stop at the first end",
    "truncated": "the shard ends, or turns into rubbish, inside it",
}


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
    digests: 8 bytes of each sample's key in hex, so that millions of keys can be compared over shards. members,
    left_out, repeated: as training reads the shard, for its index.
    """

    url: str
    bytes: int = 0
    sha256: str = ""
    samples: int = 0
    problems: list[Problem] = field(default_factory=list)
    digests: str = ""
    members: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    repeated: int = 0

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
    """The members of one key (extension -> number in the index), together or apart; fault: (cause, detail).

    No members: the index has left them out for that fault.
    """

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
    report.members, report.repeated = members_of(index), index.repeated
    report.left_out = left_out_of(index) or ({"truncated": 1} if was_damaged(path) else {})
    samples = _gather(index)
    report.samples = len(samples)
    report.digests = "".join(_digest(sample.key) for sample in samples)
    report.problems.extend(_shard_problems(path, index))
    with path.open("rb") as file:
        for row, sample in enumerate(samples):
            raw = _read(file.fileno(), index, sample, report.name)
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
    """The samples in order; members that stand apart from others of their key join the sample they belong to.

    At the end, those that the index has left out, if it is known which they were.
    """
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
    lost = zip(index.torn.tolist(), index.torn_causes.tolist(), strict=True)
    samples += [_Sample(key, {}, (why, _OF_A_SAMPLE[why])) for key, why in lost if why in _OF_A_SAMPLE]
    return samples


def _read(descriptor: int, index: TarIndex, sample: _Sample, shard: str) -> RawSample:
    members = {
        extension: member_for_tools(index, descriptor, member) for extension, member in sample.members.items()
    }
    return RawSample(shard, sample.key, members)


def _sample_problems(checks: SampleChecks, row: int, sample: _Sample, raw: RawSample) -> Iterator[Problem]:
    if sample.fault is not None:
        yield Problem(row, sample.key, *sample.fault)
    if not sample.members:
        return
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
    lost = zip(index.torn.tolist(), index.torn_causes.tolist(), strict=True)
    damages = [(key, why) for key, why in lost if why in _OF_THE_SHARD]
    for key, why in damages:
        yield Problem(WHOLE_SHARD, "" if key == "?" else key, why, _OF_THE_SHARD[why])
    if damages:
        return
    if was_damaged(path):
        yield Problem(WHOLE_SHARD, "", "truncated", "the gzip stream is damaged")
    elif not len(index):
        if not len(index.torn):
            yield Problem(WHOLE_SHARD, "", "empty shard", "no sample")
    elif not _has_end(path, index):
        detail = "no mark of the end: whole samples may be missing"
        yield Problem(WHOLE_SHARD, index.key(len(index) - 1), "truncated", detail)


def _has_end(path: Path, index: TarIndex) -> bool:
    """Is there a block of zeros behind the members? Hidden files, which belong to no sample, may stand before it."""
    # of a file with holes the tar has less than its size
    end = int(np.where(index.offsets < 0, -index.offsets, index.offsets + index.sizes).max())
    with path.open("rb") as file:
        file.seek(-(-end // BLOCK) * BLOCK)
        return any(not block.strip(b"\0") for block in iter(lambda: file.read(BLOCK), b""))
