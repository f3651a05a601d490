"""Draw random samples of shards; only those are read, and of a large set only some shards are opened."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from siglip_train.data.remote.locations import expand
from siglip_train.data.shards.reader import RawSample, indexed_tar, short_name
from siglip_train.data.shards.tar import TarIndex, member_for_tools
from siglip_train.errors import UserError

# of a remote set every shard opened is a download
_MAX_SHARDS = 64
# reasons in the message that there is no sample at all
_NAMED = 3


class Picked(NamedTuple):
    """What was drawn; unreadable: why of each shard that could not be opened."""

    samples: list[RawSample]
    unreadable: list[str]


class _Open(NamedTuple):
    url: str
    path: Path
    tar: TarIndex


def pick(shards: str, count: int, seed: int, cache: Path) -> Picked:
    """At most `count` different samples with all their members, in file order.

    The same for the same shards, count and seed. Of more than 64 shards, 64 are drawn first. Raises `UserError` where
    no shard has a sample.
    """
    rng = np.random.default_rng(seed)
    urls = list(dict.fromkeys(expand(shards)))
    chosen = sorted(rng.choice(len(urls), min(len(urls), _MAX_SHARDS), replace=False).tolist())
    opened, unreadable = _open_all([urls[number] for number in chosen], cache)
    ends = np.cumsum([len(shard.tar) for shard in opened])
    total = int(ends[-1]) if opened else 0
    if not total:
        raise UserError("; ".join([f"{shards}: no sample in these shards", *unreadable[:_NAMED]]))
    samples = []
    for position in sorted(rng.choice(total, min(count, total), replace=False).tolist()):
        number = int(np.searchsorted(ends, position, side="right"))
        url, path, index = opened[number]
        row = position - (int(ends[number - 1]) if number else 0)
        samples.append(RawSample(short_name(url), index.key(row), _members(path, index, row)))
    return Picked(samples, unreadable)


def _open_all(urls: list[str], cache: Path) -> tuple[list[_Open], list[str]]:
    opened, unreadable = [], []
    for url in urls:
        try:
            opened.append(_Open(url, *indexed_tar(url, cache)))
        except UserError as error:
            unreadable.append(str(error))
    return opened, unreadable


def _members(path: Path, index: TarIndex, row: int) -> dict[str, bytes]:
    with path.open("rb") as file:
        return {
            extension: member_for_tools(index, file.fileno(), member)
            for extension, member in index.members(row).items()
        }
