"""Draw random samples of shards; only those are read, and of a large set only some shards are opened."""

import os
from pathlib import Path

import numpy as np

from siglip_train.data.cache import local_tar
from siglip_train.data.locations import expand
from siglip_train.data.shards import RawSample, short_name
from siglip_train.data.tar import BrokenTarError, TarIndex, load_index
from siglip_train.errors import UserError

# of a remote set every shard opened is a download
_MAX_SHARDS = 64


def pick(shards: str, count: int, seed: int, cache: Path) -> list[RawSample]:
    """At most `count` different samples with all their members, in file order.

    The same for the same shards, count and seed. Of more than 64 shards, 64 are drawn first. Raises `UserError`.
    """
    rng = np.random.default_rng(seed)
    urls = list(dict.fromkeys(expand(shards)))
    chosen = sorted(rng.choice(len(urls), min(len(urls), _MAX_SHARDS), replace=False).tolist())
    opened = [(urls[number], *_open(urls[number], cache)) for number in chosen]
    ends = np.cumsum([len(index) for _, _, index in opened])
    total = int(ends[-1])
    if not total:
        raise UserError(f"{shards}: no sample in these shards")
    samples = []
    for position in sorted(rng.choice(total, min(count, total), replace=False).tolist()):
        number = int(np.searchsorted(ends, position, side="right"))
        url, path, index = opened[number]
        row = position - (int(ends[number - 1]) if number else 0)
        samples.append(RawSample(short_name(url), index.key(row), _members(path, index, row)))
    return samples


def _open(url: str, cache: Path) -> tuple[Path, TarIndex]:
    path = local_tar(url, cache)
    try:
        return path, load_index(path, cache)
    except BrokenTarError as error:
        raise UserError(f"cannot read shard {url}: {error}; remove it from the list or repair it") from error


def _members(path: Path, index: TarIndex, row: int) -> dict[str, bytes]:
    with path.open("rb") as file:
        return {
            extension: os.pread(file.fileno(), int(index.sizes[member]), int(index.offsets[member]))
            for extension, member in index.members(row).items()
        }
