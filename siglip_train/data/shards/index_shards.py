"""Before training: find the shards of every source and count their complete samples, on all ranks together."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from siglip_train.data.remote.cache import UNKNOWN, ExpectedShard, ShardCache, UnavailableShardError
from siglip_train.data.remote.disk_budget import rounded
from siglip_train.data.remote.fetch import FetchError
from siglip_train.data.remote.limits import OversizedError
from siglip_train.data.remote.locations import beside, expand, is_remote, lasting_name, short_name, unsigned
from siglip_train.data.shards.faults import BadSample
from siglip_train.data.shards.kept_index import index_of_copy, load_index
from siglip_train.data.shards.manifest import INDEX_NAME, Entry, read_index
from siglip_train.data.shards.reader import ShardSet, Wanted, complete_samples, damaged_samples
from siglip_train.data.shards.select import EVERYTHING
from siglip_train.data.shards.tar import TarIndex
from siglip_train.data.shards.tar_members import BrokenTarError
from siglip_train.distributed.collectives import broadcast_object, gather_objects, is_distributed
from siglip_train.errors import UserError, said

_LOG = logging.getLogger(__name__)
_THREADS = 8
# names in messages
_NAMED = 5
_SO_BEFORE = "it could not be counted when the run began"

Progress = Callable[[int, int], None]


class _Task(NamedTuple):
    """A shard to count; entry: what the index beside it says, None = it is in none."""

    url: str
    wanted: Wanted
    entry: Entry | None


class _Shard(NamedTuple):
    """What is learned of one shard. failure: why it cannot be counted; is_away: it is remote, and may come."""

    path: Path
    samples: int = 0
    size: int = 0
    known: ExpectedShard = UNKNOWN
    excluded: tuple[BadSample, ...] = ()
    repeated: int = 0
    failure: str = ""
    is_away: bool = False


def index_shards(specs: Sequence[str | list[str]], wanted: Sequence[Wanted], cache: ShardCache,
           progress: Progress | None = None, *, left_out: Collection[str] = (),
           may_leave_out: bool = False) -> list[ShardSet]:  # fmt: skip
    """Find and count the shards of every source; every rank looks at a part and gets the whole.  # all ranks

    A remote shard is fetched to be counted, unless an `index.json` in its folder or an earlier count of the same
    version says what it holds; one that cannot be had is asked for once more after the others. progress: called with
    (shards done, shards in all) of this rank. left_out: shards, by `lasting_name`, that are not asked for and taken as
    empty. may_leave_out: so are remote ones that cannot be counted, instead of being an error. Raises `UserError` on
    every rank alike.
    """
    urls = _expanded(specs)
    entries = _entries([url for source in urls for url in source], cache)
    tasks = [
        _Task(url, want, entries.get(url))
        for source, want in zip(urls, wanted, strict=True)
        for url in source
        if not _was_left_out(url, left_out)
    ]
    scanned = iter(_scan_together(tasks, cache, progress, may_leave_out=may_leave_out))
    sets = []
    for source, want in zip(urls, wanted, strict=True):
        shards = [
            _away(url, cache, _SO_BEFORE) if _was_left_out(url, left_out) else next(scanned) for url in source
        ]
        sets.append(
            ShardSet(
                source,
                [shard.path for shard in shards],
                want,
                cache,
                counts=np.array([shard.samples for shard in shards], dtype=np.int64),
                sizes=np.array([shard.size for shard in shards], dtype=np.int64),
                known=[shard.known for shard in shards],
                excluded=[bad for shard in shards for bad in shard.excluded],
                repeated=sum(shard.repeated for shard in shards),
                left_out={
                    url: shard.failure for url, shard in zip(source, shards, strict=True) if shard.failure
                },
            )
        )
    return sets


def _was_left_out(url: str, left_out: Collection[str]) -> bool:
    # checkpoints of earlier versions hold commands as they are
    return bool(left_out) and (lasting_name(url) in left_out or unsigned(url) in left_out)


def _expanded(specs: Sequence[str | list[str]]) -> list[list[str]]:
    """The shards of every source as rank 0 finds them: a listing may have become longer when another asks."""
    found: list[list[str]] | str = []
    if not is_distributed() or dist.get_rank() == 0:
        try:
            found = [expand(spec) for spec in specs]
        except UserError as error:
            # the others would wait for ever if it were raised here
            found = str(error)
    found = broadcast_object(found)
    if isinstance(found, str):
        raise UserError(found)
    return found


def check_room(shard_sets: Sequence[ShardSet], cache: ShardCache, window: int, in_flight: int) -> None:
    """Raise `UserError` if the cache cannot hold the copies that are needed at a time.

    These are the shards of two shuffle windows, of `window` samples or somewhat more, and of the samples in flight.
    """
    if cache.limit is None:
        return
    needed = 0
    for shards in shard_sets:
        places = zip(shards.paths, shards.sizes.tolist(), strict=True)
        sizes = [rounded(size) for path, size in places if cache.is_copy(path)]
        # shards of the mean number of samples and the largest size; each window may reach into one more
        count = math.ceil((2 * window + in_flight) * len(shards.urls) / max(len(shards), 1)) + 2
        needed += min(sum(sizes), count * max(sizes, default=0))
    if needed > cache.limit:
        raise UserError(
            f"data.cache_limit_gib {cache.limit / 2**30:.3g} cannot hold the shards of two shuffle windows, which need"
            f" {needed / 2**30:.3g}: raise it, or lower data.shuffle_window ({window})"
        )


def _entries(urls: Iterable[str], cache: ShardCache) -> dict[str, Entry]:
    """What the indexes beside remote shards say, by URL; each is fetched once, by rank 0.  # all ranks"""
    remote = [url for url in urls if is_remote(url)]
    if not remote:
        return {}
    entries: dict[str, Entry] = {}
    if not is_distributed() or dist.get_rank() == 0:
        places = {url: beside(url, INDEX_NAME) for url in remote}
        files = sorted({place for place in places.values() if place is not None})
        with ThreadPoolExecutor(_THREADS) as pool:
            indexes = dict(zip(files, pool.map(lambda file: _read_index(file, cache), files), strict=True))
        for url, place in places.items():
            entry = indexes.get(place or "", {}).get(short_name(unsigned(url)))
            if entry is not None:
                entries[url] = entry
        missing = [url for url in remote if url not in entries]
        if missing:
            _LOG.warning(
                "%d of %d remote shards, such as %s, are in no %s beside them: each is fetched once to be counted;"
                " `siglip-data verify SHARDS --index %s` writes what to put there",
                *(len(missing), len(remote), short_name(missing[0]), INDEX_NAME, INDEX_NAME),
            )
    return broadcast_object(entries)


def _read_index(url: str, cache: ShardCache) -> dict[str, Entry]:
    """An index that cannot be read is as good as none: the shards are counted themselves."""
    try:
        return read_index(cache.read_small(url))
    except FetchError as error:
        if not error.is_absent:
            _LOG.warning("cannot read %s: %s", url, error)
    except (UserError, ValueError) as error:
        _LOG.warning("%s is no index of shards: %s", url, error)
    return {}


def _scan_together(
    tasks: list[_Task], cache: ShardCache, progress: Progress | None, *, may_leave_out: bool
) -> list[_Shard]:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    mine = tasks[rank::ranks]
    results = []
    for done, shard in enumerate(_scans(mine, cache), start=1):
        results.append(shard)
        if progress is not None:
            progress(done, len(mine))
    # a server may have been away for longer than all attempts took, and be back now that the others are counted
    away = [number for number, shard in enumerate(results) if shard.is_away]
    if len(away) < len(mine):
        anew = replace(cache, since=time.time())
        for number, shard in zip(away, _scans([mine[number] for number in away], anew), strict=True):
            results[number] = shard
    parts = gather_objects(results)
    shards = [parts[number % ranks][number // ranks] for number in range(len(tasks))]
    failed = [
        (task.url, shard)
        for task, shard in zip(tasks, shards, strict=True)
        if shard.failure and not (shard.is_away and may_leave_out)
    ]
    if failed:
        more = f" (and {len(failed) - _NAMED} more)" if len(failed) > _NAMED else ""
        if any(shard.is_away for _, shard in failed):
            more += (
                "; a shard that is not counted has no place in the order: try again later, leave it out, or put an"
                f" {INDEX_NAME} beside the shards (`siglip-data verify SHARDS --index {INDEX_NAME}`)"
            )
        raise UserError(
            "; ".join(f"cannot read shard {url}: {shard.failure}" for url, shard in failed[:_NAMED]) + more
        )
    return shards


def _scans(tasks: Sequence[_Task], cache: ShardCache) -> Iterator[_Shard]:
    # waiting for disks and networks, not for the interpreter
    with ThreadPoolExecutor(_THREADS) as pool:
        for shard in pool.map(lambda task: _scan(task, cache), tasks):
            for event in cache.events.drain():
                # what has failed is said when all are counted
                if event.message and event.name == "fetch_retries":
                    _LOG.warning(event.message)
            yield shard


def _scan(task: _Task, cache: ShardCache) -> _Shard:
    # a failure travels to the other ranks, which would wait for ever if it were raised here
    try:
        return _counted(task, cache)
    except BrokenTarError as error:
        failure = f"{error}; remove it from the list or repair it"
    except UnavailableShardError as error:
        return _away(task.url, cache, error.detail)
    except FetchError as error:
        return _away(task.url, cache, str(error))
    except OversizedError as error:
        # as bad as a sample, and there may be a thousand good shards beside it
        return _Shard(Path(), excluded=(BadSample(short_name(task.url), "?", "shard too large", str(error)),))
    except OSError as error:
        failure = said(error)
    except UserError as error:
        # some say already which shard it is
        failure = str(error).removeprefix(f"cannot read shard {task.url}: ")
    return _Shard(Path(), failure=failure)


def _away(url: str, cache: ShardCache, failure: str) -> _Shard:
    # its place is never read, as it counts as empty
    return _Shard(cache.path(url, ExpectedShard(version="")), failure=failure, is_away=True)


def _counted(task: _Task, cache: ShardCache) -> _Shard:
    url, entry = task.url, task.entry
    known = cache.identify(url) if entry is None else ExpectedShard(entry.sha256, entry.bytes, entry.sha256)
    path = cache.path(url, known)
    if entry is not None and task.wanted.select == EVERYTHING:
        # which samples they are shows when the shard comes
        excluded = [
            bad
            for cause, count in entry.incomplete(task.wanted).items()
            for bad in [BadSample(short_name(url), "?", cause, f"so says {INDEX_NAME}")] * count
        ]
        samples = entry.complete(task.wanted)
        return _Shard(path, samples, entry.bytes, known, tuple(excluded), entry.repeated)
    index = index_of_copy(path, cache.folder) if cache.is_copy(path) else None
    if index is None:
        path = cache.local_tar(url, known)
        index = _index_of(url, path, cache)
    samples, excluded = _complete(index, task.wanted, short_name(url), path)
    return _Shard(path, samples, index.file_size, known, tuple(excluded), index.repeated)


def _index_of(url: str, path: Path, cache: ShardCache) -> TarIndex:
    try:
        return load_index(path, cache.folder)
    except BrokenTarError as error:
        if is_remote(url):
            raise cache.reject(url, path, str(error)) from error
        raise


def _complete(index: TarIndex, wanted: Wanted, name: str, path: Path) -> tuple[int, list[BadSample]]:
    image, meant, complete = complete_samples(index, wanted)
    excluded = [
        BadSample(
            name,
            index.key(int(sample)),
            "no image" if image[sample] < 0 else "no text",
            # of a million the log names a few
            f"it holds {', '.join(index.members(int(sample)))}" if place < _NAMED else "",
        )
        for place, sample in enumerate(np.flatnonzero(meant & ~complete))
    ]
    excluded += damaged_samples(name, path, index)
    return int(complete.sum()), excluded
