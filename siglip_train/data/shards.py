"""The samples of a list of shards, by number: counted before training, then read by offset in any order."""

import collections
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from siglip_train.data.faults import BadSample
from siglip_train.data.locations import default_cache, expand, local_tar, was_damaged
from siglip_train.data.select import EVERYTHING, Selection
from siglip_train.data.tar import BrokenTarError, TarIndex, load_index, read_member
from siglip_train.distributed.collectives import gather_objects, is_distributed
from siglip_train.errors import UserError

_THREADS = 8
# per process; a window of small shards should fit, or every sample would load an index
_INDEXES = 512
_DESCRIPTORS = 128
# names in messages
_NAMED = 5

Progress = Callable[[int, int], None]


class RawSample(NamedTuple):
    """The bytes of a sample. `members` maps extensions to content."""

    shard: str
    key: str
    members: dict[str, bytes]

    @property
    def name(self) -> str:
        """`shard/key`, for messages."""
        return f"{self.shard}/{self.key}"


@dataclass(frozen=True)
class Wanted:
    """Which members make a sample: one of `image` (in order of preference), one of `text` (None = no text needed).

    extra: members that are read where they are present. select: the keys that are meant.
    """

    image: tuple[str, ...]
    text: tuple[str, ...] | None = None
    extra: tuple[str, ...] = ()
    select: Selection = EVERYTHING


class _Shard(NamedTuple):
    """What the survey learns of one shard."""

    path: Path
    samples: int
    excluded: tuple[BadSample, ...] = ()
    repeated: int = 0
    failure: str = ""


def short_name(shard: str) -> str:
    """The file name of a shard, as it stands in messages."""
    return shard.rstrip("/").rsplit("/", 1)[-1] or shard


@dataclass
class ShardSet:
    """The complete samples of one source: `counts[i]` samples in shard i.

    excluded: samples that lack a wanted member or are cut off, found before training.
    """

    urls: list[str]
    paths: list[Path]
    wanted: Wanted
    cache: Path
    counts: NDArray[np.int64]
    excluded: list[BadSample] = field(default_factory=list)
    repeated: int = 0

    def __len__(self) -> int:
        return int(self.counts.sum())

    @functools.cached_property
    def ends(self) -> NDArray[np.int64]:
        """Samples up to and including each shard."""
        return np.cumsum(self.counts)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, sample) of a position in file order."""
        shard = int(np.searchsorted(self.ends, position, side="right"))
        return shard, position - int(self.ends[shard] - self.counts[shard])


def survey(specs: Sequence[str | list[str]], wanted: Sequence[Wanted], cache_dir: str | None,
           progress: Progress | None = None) -> list[ShardSet]:  # fmt: skip
    """Find, fetch and count the shards of every source; every rank scans a part and gets the whole.  # all ranks

    progress: called with (shards done, shards in all) of this rank. Raises `UserError` on every rank alike.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
    urls = [expand(spec) for spec in specs]
    tasks = [(url, want) for source, want in zip(urls, wanted, strict=True) for url in source]
    scanned = iter(_scan_together(tasks, cache, progress))
    sets = []
    for source, want in zip(urls, wanted, strict=True):
        shards = [next(scanned) for _ in source]
        counts = np.array([shard.samples for shard in shards], dtype=np.int64)
        excluded = [bad for shard in shards for bad in shard.excluded]
        paths = [shard.path for shard in shards]
        sets.append(ShardSet(source, paths, want, cache, counts, excluded, sum(s.repeated for s in shards)))
    return sets


def _scan_together(tasks: list[tuple[str, Wanted]], cache: Path, progress: Progress | None) -> list[_Shard]:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    mine = tasks[rank::ranks]
    results = []
    # waiting for disks and networks, not for the interpreter
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, shard in enumerate(pool.map(lambda task: _scan(task[0], task[1], cache), mine), start=1):
            results.append(shard)
            if progress is not None:
                progress(done, len(mine))
    parts = gather_objects(results)
    shards = [parts[number % ranks][number // ranks] for number in range(len(tasks))]
    failures = [shard.failure for shard in shards if shard.failure]
    if failures:
        more = f" (and {len(failures) - _NAMED} more)" if len(failures) > _NAMED else ""
        raise UserError("; ".join(failures[:_NAMED]) + more)
    return shards


def _scan(url: str, wanted: Wanted, cache: Path) -> _Shard:
    # a failure travels to the other ranks, which would wait for ever if it were raised here
    try:
        path = local_tar(url, cache)
        index = load_index(path, cache)
    except BrokenTarError as error:
        return _Shard(
            Path(), 0, failure=f"cannot read shard {url}: {error}; remove it from the list or repair it"
        )
    except UserError as error:
        return _Shard(Path(), 0, failure=str(error))
    name = short_name(url)
    image, meant, complete = _complete(index, wanted)
    excluded = [
        BadSample(name, index.key(int(sample)), "no image" if image[sample] < 0 else "no text")
        for sample in np.flatnonzero(meant & ~complete)
    ]
    excluded += [
        BadSample(name, *each) for each in zip(index.torn.tolist(), index.torn_causes.tolist(), strict=True)
    ]
    if was_damaged(path) and not len(index.torn):
        excluded.append(BadSample(name, "?", "truncated", "the gzip stream is damaged"))
    return _Shard(path, int(complete.sum()), tuple(excluded), index.repeated)


def _complete(
    index: TarIndex, wanted: Wanted
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Of every sample in the index: its image member or -1, whether it is selected, and whether it is to be read."""
    image = index.find(wanted.image)
    meant = np.ones(len(index), dtype=bool)
    if wanted.select != EVERYTHING:
        meant = np.array([index.key(sample) in wanted.select for sample in range(len(index))], dtype=bool)
    complete = meant & (image >= 0)
    if wanted.text is not None:
        complete &= index.find(wanted.text) >= 0
    return image, meant, complete


class _Open(NamedTuple):
    """A shard ready to read: its index and the numbers of its complete samples."""

    tar: TarIndex
    samples: NDArray[np.int64]


class ShardReader:
    """Reads samples of a `ShardSet` by (shard, sample); picklable and fork-safe, since files open at first use."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._open = functools.lru_cache(_INDEXES)(self._load)
        self._descriptors: collections.OrderedDict[int, int] = collections.OrderedDict()

    def __reduce__(self) -> tuple:
        return ShardReader, (self.shards,)

    def _load(self, shard: int) -> _Open:
        index = load_index(self._path(shard), self.shards.cache)
        return _Open(index, np.flatnonzero(_complete(index, self.shards.wanted)[2]))

    def _path(self, shard: int) -> Path:
        path = self.shards.paths[shard]
        if not path.exists():
            # another machine fetched it during the survey
            path = local_tar(self.shards.urls[shard], self.shards.cache)
        return path

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            descriptor = os.open(self._path(shard), os.O_RDONLY)
            if len(self._descriptors) >= _DESCRIPTORS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = descriptor
        return descriptor

    def read(self, shard: int, sample: int) -> RawSample:
        """The wanted members of a complete sample; the image is the first of its preferred extensions."""
        index, samples = self._open(shard)
        row = int(samples[sample])
        present, wanted = index.members(row), self.shards.wanted
        image = next(extension for extension in wanted.image if extension in present)
        names = [
            name for name in dict.fromkeys((image, *(wanted.text or ()), *wanted.extra)) if name in present
        ]
        descriptor = self._descriptor(shard)
        members = {name: read_member(index, descriptor, present[name]) for name in names}
        return RawSample(
            short_name(self.shards.urls[shard]), index.key(row), {"image": members.pop(image), **members}
        )

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def read_samples(shards: str | list[str], cache_dir: str | None = None) -> Iterator[RawSample]:
    """Every sample of the shards with all its members, in file order, for tools. Raises `UserError`."""
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
    for url in expand(shards):
        path = local_tar(url, cache)
        try:
            index = load_index(path, cache)
        except BrokenTarError as error:
            raise UserError(f"cannot read shard {url}: {error}") from error
        with path.open("rb") as file:
            for sample in range(len(index)):
                members = {
                    extension: os.pread(file.fileno(), int(index.sizes[member]), int(index.offsets[member]))
                    for extension, member in index.members(sample).items()
                }
                yield RawSample(short_name(url), index.key(sample), members)
