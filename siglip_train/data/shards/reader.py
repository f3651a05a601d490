"""The samples of a list of shards, by number: read by offset in any order. `index_shards.py` counts them before."""

import collections
import contextlib
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from siglip_train.data.remote.cache import ExpectedShard, ShardCache, local_tar, was_damaged
from siglip_train.data.remote.locations import cache_folder, expand, is_remote, short_name
from siglip_train.data.shards.faults import BadSample
from siglip_train.data.shards.kept_index import load_index
from siglip_train.data.shards.select import EVERYTHING, Selection
from siglip_train.data.shards.tar import TarIndex, member_for_tools, read_member
from siglip_train.data.shards.tar_members import BrokenTarError
from siglip_train.errors import UserError

# per process; a window of small shards should fit, or every sample would load an index
_INDEXES = 512
_DESCRIPTORS = 128
# a copy may be removed between fetching and opening it
_ATTEMPTS = 3


class RawSample(NamedTuple):
    """The bytes of a sample. `members` maps extensions to content; place: (shard, sample) in its `ShardSet`."""

    shard: str
    key: str
    members: dict[str, bytes]
    place: tuple[int, int] = (-1, -1)

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


@dataclass
class ShardSet:
    """The complete samples of one source: `counts[i]` samples in shard i, in a tar of `sizes[i]` bytes.

    paths: where the tars are; a copy may have been removed to make room, or not been made yet. known: of each shard,
    for the time it is fetched. excluded: samples that lack a wanted member or are cut off, found before training.
    left_out: remote shards that could not be counted and are taken as empty, and why.
    """

    urls: list[str]
    paths: list[Path]
    wanted: Wanted
    cache: ShardCache
    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    known: list[ExpectedShard]
    excluded: list[BadSample] = field(default_factory=list)
    repeated: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.counts.sum())

    @functools.cached_property
    def has_copies(self) -> bool:
        """Does reading need copies in the cache?"""
        return any(map(self.cache.is_copy, self.paths))

    @functools.cached_property
    def ends(self) -> NDArray[np.int64]:
        """Samples up to and including each shard."""
        return np.cumsum(self.counts)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, sample) of a position in file order."""
        shard = int(np.searchsorted(self.ends, position, side="right"))
        return shard, position - int(self.ends[shard] - self.counts[shard])


def complete_samples(
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


class OpenShard(NamedTuple):
    """A shard ready to read: its tar, the index of it and the numbers of its complete samples. name: for messages."""

    path: Path
    tar: TarIndex
    samples: NDArray[np.int64]
    name: str
    is_copy: bool


def open_shard(shards: ShardSet, shard: int, cache: ShardCache) -> OpenShard:
    """Find or make the copy of a shard, and look whether a remote one holds what it was to hold.

    Raises `UnavailableShardError`, for a local shard `BrokenTarError` and `UserError`, FileNotFoundError for a copy
    that has just been removed.
    """
    url, path = shards.urls[shard], shards.paths[shard]
    if not path.exists():
        path = cache.local_tar(url, shards.known[shard])
    try:
        index = load_index(path, cache.folder)
    except BrokenTarError as error:
        if cache.is_copy(path) and not path.exists():
            raise FileNotFoundError(path) from error
        if is_remote(url):
            raise cache.reject(url, path, str(error)) from error
        raise
    samples = np.flatnonzero(complete_samples(index, shards.wanted)[2])
    if is_remote(url):
        if len(samples) != shards.counts[shard]:
            reason = f"it holds {len(samples)} complete samples instead of {shards.counts[shard]}"
            raise cache.reject(url, path, reason)
        cache.accept(url)
    return OpenShard(path, index, samples, short_name(url), cache.is_copy(path))


class ShardReader:
    """Reads samples of a `ShardSet` by (shard, sample); picklable and fork-safe, since files open at first use."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._limit = shards.cache.limits.member_bytes
        self._opened: collections.OrderedDict[int, OpenShard] = collections.OrderedDict()
        self._descriptors: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._touched: dict[int, float] = {}

    def __reduce__(self) -> tuple:
        return ShardReader, (self.shards,)

    def read(self, shard: int, sample: int, *, image: bool = True) -> RawSample:
        """The wanted members of a complete sample; the image is the first of its preferred extensions.

        image: read it too, the largest part of a sample.
        Raises `UnavailableShardError` where a remote shard cannot be had now.
        """
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return self._read(shard, sample, image=image)
            # the copy was removed to make room for another
            self._opened.pop(shard, None)
        raise FileNotFoundError(f"{self.shards.paths[shard]} is removed again and again")

    def failed(self) -> dict[str, str]:
        """The shards of this set that cannot be had now, and why."""
        failures = self.shards.cache.failed.all()
        return {self._urls[name]: failure.reason for name, failure in failures.items() if name in self._urls}

    @functools.cached_property
    def _urls(self) -> dict[str, str]:
        """By the names that the cache gives them."""
        return {self.shards.cache.name(url): url for url in self.shards.urls}

    def _read(self, shard: int, sample: int, *, image: bool) -> RawSample:
        opened = self._open(shard)
        index, row = opened.tar, int(opened.samples[sample])
        present, wanted = index.members(row), self.shards.wanted
        places = {name: present[name] for name in (*(wanted.text or ()), *wanted.extra) if name in present}
        if image:
            places["image"] = next(present[extension] for extension in wanted.image if extension in present)
        with self._descriptor(shard, opened) as descriptor:
            members = {
                name: read_member(index, descriptor, place, self._limit) for name, place in places.items()
            }
        return RawSample(opened.name, index.key(row), members, (shard, sample))

    def key(self, shard: int, sample: int) -> str:
        """The key of a complete sample; "?" in a remote shard, which might have to be fetched for it."""
        if is_remote(self.shards.urls[shard]):
            return "?"
        opened = self._open(shard)
        return opened.tar.key(int(opened.samples[sample]))

    def _open(self, shard: int) -> OpenShard:
        opened = self._opened.pop(shard, None) or open_shard(self.shards, shard, self.shards.cache)
        if len(self._opened) >= _INDEXES:
            self._opened.popitem(last=False)
        self._opened[shard] = opened
        return opened

    @contextlib.contextmanager
    def _descriptor(self, shard: int, opened: OpenShard) -> Iterator[int]:
        if opened.is_copy:
            # not kept open: a file that was removed takes up the disk until its last reader lets go
            descriptor = os.open(opened.path, os.O_RDONLY)
            try:
                self._touch(shard, opened.path)
                yield descriptor
            finally:
                os.close(descriptor)
            return
        descriptor = self._descriptors.pop(shard, -1)
        if descriptor < 0:
            descriptor = os.open(opened.path, os.O_RDONLY)
            if len(self._descriptors) >= _DESCRIPTORS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = descriptor
        yield descriptor

    def _touch(self, shard: int, path: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(shard, 0.0) >= 1:
            self._touched[shard] = now
            self.shards.cache.room.touch(path)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def damaged_samples(shard: str, path: Path, index: TarIndex) -> list[BadSample]:
    """The samples that damage of a shard's tar or gzip stream has cost, as far as they are known."""
    lost = zip(index.torn.tolist(), index.torn_causes.tolist(), strict=True)
    found = [BadSample(shard, key, cause, "the shard is damaged there") for key, cause in lost]
    if was_damaged(path) and not found:
        found.append(BadSample(shard, "?", "truncated", "the gzip stream is damaged"))
    return found


def indexed_tar(url: str, cache: Path) -> tuple[Path, TarIndex]:
    """(plain tar on this machine, its index), for tools. Raises `UserError`."""
    path = local_tar(url, cache)
    try:
        return path, load_index(path, cache)
    except BrokenTarError as error:
        raise UserError(f"cannot read shard {url}: {error}; repair it or leave it out") from error


def read_samples(shards: str | list[str], cache_dir: str | Path | None = None) -> Iterator[RawSample]:
    """Every sample of the shards with all its members, in file order, for tools. Raises `UserError`."""
    cache = cache_folder(cache_dir)
    for url in expand(shards):
        path, index = indexed_tar(url, cache)
        with path.open("rb") as file:
            for sample in range(len(index)):
                members = {
                    extension: member_for_tools(index, file.fileno(), member)
                    for extension, member in index.members(sample).items()
                }
                yield RawSample(short_name(url), index.key(sample), members)
