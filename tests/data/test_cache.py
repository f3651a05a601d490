"""Copies of shards: fetched whatever the server does, unpacked, found again, and never more than the cache may hold."""

import contextlib
import gzip
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from siglip_train.data.remote.cache import (
    ExpectedShard,
    ShardCache,
    UnavailableShardError,
    local_tar,
    was_damaged,
)
from siglip_train.data.remote.disk_budget import DiskBudget, PartialFile
from siglip_train.data.remote.locations import expand
from siglip_train.data.remote.retry import _SLOWEST, CancelledError, RetryPolicy
from siglip_train.data.shards.kept_index import index_of_copy, load_index
from siglip_train.data.shards.scan import scan
from siglip_train.errors import UserError
from tests.data.faulty_server import Faults, serve
from tests.data.shard_files import sample, write_shards, write_tar

# enough for a busy machine to answer; where silence is tested, the time-out is short
STEADY = RetryPolicy(timeout_seconds=10, attempts=4)
SHORT = RetryPolicy(timeout_seconds=0.4, attempts=4)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards in a folder."""
    write_shards(tmp_path / "in", [2, 1, 3])
    return tmp_path / "in"


@pytest.fixture
def server(shards: Path) -> Iterator[Faults]:
    """Serves the shards."""
    with serve(shards) as faults:
        yield faults


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardCache:
    """A cache that makes short pauses."""
    monkeypatch.setattr("siglip_train.data.remote.retry._FIRST_PAUSE", 0.001)
    return ShardCache(tmp_path / "cache", retries=STEADY)


def _copies(cache: ShardCache) -> list[Path]:
    return sorted(cache.room.folder.iterdir())


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        (["drop"], ["", "bytes={half}-"]),
        (["stall"], ["", "bytes={half}-"]),
        (["silent", "500", "429"], ["", "", "", ""]),
        # it goes on in the middle of the middle
        (["drop", "drop"], ["", "bytes={half}-", "bytes={more}-"]),
        # nothing says that the rest is of the same file
        (["plain"], ["", ""]),
        (["drop", "no-range"], ["", "bytes={half}-"]),
        (["drop", "changed"], ["", "bytes={half}-", ""]),
    ],
    ids=" ".join,
)
def test_attempts_go_on_where_the_last_one_broke_off(
    faults: list[str],
    requests: list[str],
    shards: Path,
    server: Faults,
    quick: ShardCache,
):
    data = (shards / "00002.tar").read_bytes()
    server["00002.tar"] = faults
    if {"stall", "silent"} & set(faults):
        quick = ShardCache(quick.folder, retries=RetryPolicy(1.5, 4))
    assert quick.local_tar(f"{server.url}/00002.tar").read_bytes() == data
    half = len(data) // 2
    expected = [each.format(half=half, more=half + (len(data) - half) // 2) for each in requests]
    assert server.asked == ["HEAD 00002.tar", *(f"GET 00002.tar {each}".strip() for each in expected)]
    events = quick.events.drain()
    assert [event.name for event in events] == ["fetch_retries"] * (len(requests) - 1)
    # once a shard
    assert [bool(event.message) for event in events] == [True] + [False] * (len(requests) - 2)
    assert "00002.tar" in events[0].message
    assert len(_copies(quick)) == 1


@pytest.mark.parametrize(
    ("fault", "attempts", "reason"),
    [
        ("404", 1, "404"),
        ("403", 1, "403"),
        ("500", 4, r"500.*\(4 attempts\)"),
        ("silent", 4, "silent for 0.4 seconds"),
        ("drip", 1, r"0\.\d KiB/s, less than the 64 KiB/s"),
    ],
)
def test_what_cannot_be_fetched_is_named_and_not_kept(
    fault: str, attempts: int, reason: str, server: Faults, quick: ShardCache
):
    server["00001.tar"] = [fault, "..."]
    if fault in ("silent", "drip"):
        quick = ShardCache(quick.folder, retries=SHORT)
    with pytest.raises(UnavailableShardError, match=reason):
        quick.local_tar(f"{server.url}/00001.tar")
    assert server.gets() == {"00001.tar": attempts}
    assert not _copies(quick)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("pipe:exit 3", "status 3"),
        ("pipe:printf half; exit 1", "status 1"),
        ("memory://no/such.tar", "FileNotFound"),
        ("{server}/missing.tar", "404"),
    ],
)
def test_tools_get_one_line(
    url: str, reason: str, server: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("siglip_train.data.remote.retry._FIRST_PAUSE", 0)
    url = url.format(server=server.url)
    with pytest.raises(UserError, match=f"^cannot read shard {url}: .*{reason}"):
        local_tar(url, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_silent_command_is_killed_with_its_children(tmp_path: Path):
    pid, quick = tmp_path / "pid", ShardCache(tmp_path / "cache", retries=RetryPolicy(1.5, 1))
    with pytest.raises(UnavailableShardError, match="silent"):
        quick.local_tar(f"pipe:printf begun; (sleep 60 & echo $! > {pid}; wait); echo")
    _wait_for_the_end(int(pid.read_text()))


def test_a_command_ends_with_the_process_that_reads_it():
    script = """
        from siglip_train.data.remote.sources import Start, source
        items, _ = source("pipe:echo $$; sleep 60", 0, Start(""), 1)
        next(items)
        print(next(items).decode())
    """
    # the command would hold a captured stderr open
    run = subprocess.run([sys.executable, "-c", dedent(script)], stdout=subprocess.PIPE, check=True)
    _wait_for_the_end(int(run.stdout))


def _wait_for_the_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while _is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    # a zombie, if no one buries orphans here, runs no more
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_damaged_transfer_is_known_by_the_promised_checksum(
    shards: Path, server: Faults, quick: ShardCache
):
    path = shards / "00002.tar"
    known = known_of(path)
    server["00002.tar"] = ["corrupt", "short", "corrupt"]
    copy = quick.local_tar(f"{server.url}/00002.tar", known)
    assert copy.read_bytes() == path.read_bytes()
    # what was promised names the copy, so that the server need not be asked
    assert not [line for line in server.asked if line.startswith("HEAD")]
    server["00001.tar"] = ["corrupt", "..."]
    with pytest.raises(UnavailableShardError, match="SHA-256 is not that of the index"):
        quick.local_tar(f"{server.url}/00001.tar", known_of(shards / "00001.tar"))


def known_of(path: Path) -> ExpectedShard:
    """What an index says of a file."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return ExpectedShard(sha256, path.stat().st_size, sha256)


def test_a_packed_shard_may_be_promised_packed_or_unpacked(shards: Path, server: Faults, quick: ShardCache):
    packed = _gzipped(shards / "00002.tar")
    for known in (known_of(packed), known_of(shards / "00002.tar")):
        copy = quick.local_tar(f"{server.url}/{packed.name}", known)
        assert copy.read_bytes() == (shards / "00002.tar").read_bytes()
    with pytest.raises(UnavailableShardError, match="bytes, but 7 in the index"):
        quick.local_tar(f"{server.url}/{packed.name}", ExpectedShard("other", 7))


def test_a_failed_shard_is_left_alone_for_a_while_by_all_processes(
    server: Faults, quick: ShardCache, tmp_path: Path
):
    url = f"{server.url}/00000.tar"
    server["00000.tar"] = ["404"]
    with pytest.raises(UnavailableShardError):
        quick.local_tar(url)
    other = ShardCache(tmp_path / "cache", retries=STEADY, since=quick.since)
    for cache in (quick, other):
        with pytest.raises(UnavailableShardError, match="404"):
            cache.local_tar(url)
    assert server.gets() == {"00000.tar": 1}
    (event,) = quick.events.drain()
    assert event.name == "failed_shards"
    assert "00000.tar is unavailable: HTTPError: HTTP Error 404" in event.message
    assert not other.events.drain()
    assert [failure.shard for failure in other.failed.all().values()] == [url]
    # a run that starts later knows nothing of it
    assert ShardCache(tmp_path / "cache", retries=STEADY).local_tar(url).exists()


def test_a_failed_shard_is_tried_again_after_pauses_that_double(
    server: Faults, quick: ShardCache, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("siglip_train.data.remote.failed._FIRST_DELAY", 0.02)
    url, name = f"{server.url}/00000.tar", quick.name(f"{server.url}/00000.tar")
    quick.tries_first = True
    server["00000.tar"] = ["404"] * 3
    pauses = []
    for _ in range(3):
        with pytest.raises(UnavailableShardError):
            quick.local_tar(url)
        failure = quick.failed.find(name)
        assert failure is not None
        pauses.append(failure.until - failure.at)
        assert not quick.may_try(url)
        while time.time() < failure.until:
            time.sleep(0.01)
    assert pauses == pytest.approx([0.2, 0.4, 0.8])
    assert quick.local_tar(url).exists()
    quick.accept(url)
    assert [event.message for event in quick.events.drain()][-1] == "shard 00000.tar is back"
    assert quick.failed.find(name) is None


def test_a_fetch_that_no_one_waits_for_ends(server: Faults, tmp_path: Path):
    cancelled = threading.Event()
    cache = ShardCache(tmp_path / "cache", retries=RetryPolicy(60), cancelled=cancelled.is_set)
    server["00000.tar"] = ["stall"]
    threading.Timer(0.1, cancelled.set).start()
    with pytest.raises(CancelledError):
        cache.local_tar(f"{server.url}/00000.tar")
    assert not _copies(cache)


def test_the_index_of_a_copy_outlives_it(server: Faults, quick: ShardCache):
    copy = quick.local_tar(f"{server.url}/00002.tar")
    index = load_index(copy, quick.folder)
    copy.unlink()
    found = index_of_copy(copy, quick.folder)
    assert found is not None
    assert (found.offsets.tolist(), found.file_size) == (index.offsets.tolist(), index.file_size)


def test_the_copy_longest_out_of_use_makes_room(tmp_path: Path):
    limit = 40 << 10
    cache = ShardCache(tmp_path / "cache", limit=limit, retries=STEADY)
    for name in "abcd":
        (tmp_path / name).write_bytes(write_tar(tmp_path / f"{name}.tar", sample(name)).read_bytes())
    urls = {name: f"pipe:cat {tmp_path}/{name}" for name in "abcd"}
    # disks count blocks
    assert 3 * 12288 < limit < 4 * 12288
    assert 8192 < (tmp_path / "a").stat().st_size <= 12288
    for name in "abc":
        cache.local_tar(urls[name])
    cache.room.touch(cache.local_tar(urls["a"]))
    cache.local_tar(urls["d"])
    there = {name for name in "abcd" if cache.path(urls[name], ExpectedShard("")).exists()}
    assert there == {"a", "c", "d"}


def test_many_processes_and_left_parts_stay_within_the_limit(shards: Path, tmp_path: Path):
    size = (shards / "00002.tar").stat().st_size
    limit = 3 * 4096 * (-(-size // 4096))
    cache = ShardCache(tmp_path / "cache", limit=limit, retries=RetryPolicy(5, 8))
    left = cache.room.folder / f"{'0' * 24}.fetched.part"
    foreign = cache.room.folder / "mine.tar"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a process that was killed" * 1000)
    foreign.write_bytes(b"put there by someone else")
    with most_on_disk(cache) as most, ThreadPoolExecutor(6) as pool:
        urls = [f"pipe:cat {shards}/00002.tar; true {number}" for number in range(20)]
        for path in pool.map(cache.local_tar, urls):
            assert path.suffix == ".tar"
    assert 0 < most[0] <= limit + 4096
    assert not left.exists()
    assert foreign.exists()


@contextlib.contextmanager
def most_on_disk(cache: ShardCache) -> Iterator[list[int]]:
    """Looks how many bytes the copies take, all the time; gives a list whose only item is the most there were."""
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            # nothing comes or goes between the looks at two files
            with cache.room.lock("room"):
                most[0] = max(most[0], _disk_usage(cache.room.folder))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def _disk_usage(folder: Path) -> int:
    """Bytes, as du counts them: by blocks, a file that is being renamed once."""
    used = {}
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            used[entry.stat().st_ino] = entry.stat().st_blocks * 512
    return sum(used.values())


def test_a_shard_larger_than_the_cache_is_an_error_that_names_both(
    shards: Path, server: Faults, tmp_path: Path
):
    cache = ShardCache(tmp_path / "cache", limit=4096, retries=STEADY)
    with pytest.raises(UserError, match=r"a shard takes .* GiB, more than data\.cache_limit_gib"):
        cache.local_tar(f"{server.url}/00002.tar")


def test_a_transfer_waits_for_room_that_another_holds(tmp_path: Path):
    room = DiskBudget(tmp_path / "copies", 10 << 12)

    def reserve(name: str, begun: Callable[[], object]) -> None:
        with room.lock(name), PartialFile(room, name, "fetched", lambda: False) as part:
            part.begin(0, 6 << 12)
            begun()

    first = threading.Event()
    ended = threading.Event()
    holder = threading.Thread(target=reserve, args=("a" * 24, lambda: (first.set(), ended.wait(20))))
    holder.start()
    first.wait(20)
    threading.Timer(0.2, ended.set).start()
    # it would wait for ever if the room were not given back
    reserve("b" * 24, lambda: None)
    assert ended.is_set()
    holder.join()


def test_a_local_plain_tar_is_used_where_it_is(shards: Path, tmp_path: Path):
    assert local_tar(str(shards / "00000.tar"), tmp_path / "cache") == shards / "00000.tar"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["http", "pipe", "file", "memory"])
def test_remote_shards_arrive_as_they_are(kind: str, shards: Path, tmp_path: Path, server: Faults):
    path = shards / "00002.tar"
    with fsspec.open("memory://bucket/00002.tar", "wb") as out:
        out.write(path.read_bytes())
    url = {
        "http": f"{server.url}/00002.tar",
        "pipe": f"pipe:cat {path}",
        "file": f"file://{path}",
        "memory": "memory://bucket/00002.tar",
    }[kind]
    got = local_tar(url, tmp_path / "cache")
    assert got.read_bytes() == path.read_bytes()
    assert local_tar(url, tmp_path / "cache") == got


def test_a_remote_object_that_changed_is_fetched_again(tmp_path: Path):
    got = []
    for content in (sample("one"), sample("another")):
        data = write_tar(tmp_path / "a.tar", content).read_bytes()
        with fsspec.open("memory://changing/a.tar", "wb") as out:
            out.write(data)
        got.append(scan(local_tar("memory://changing/a.tar", tmp_path / "cache")).key(0))
    assert got == ["one", "another"]


@pytest.mark.parametrize("mark", ["ETag", "blob_id", "generation", "etag", "created"])
def test_an_object_of_a_listing_is_the_same_when_it_is_asked_for_alone(
    mark: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    facts_of, open_file, opened = MemoryFileSystem.info, MemoryFileSystem._open, []
    other = "Key"

    def info(filesystem: MemoryFileSystem, path: str, **options: Any) -> dict[str, Any]:
        facts = facts_of(filesystem, path, **options)
        return {**facts, mark: facts.pop("created", None), other: path}

    def open_(filesystem: MemoryFileSystem, path: str, *given: Any, **options: Any) -> Any:
        opened.append(path)
        return open_file(filesystem, path, *given, **options)

    for path in shards.glob("*.tar"):
        fsspec.filesystem("memory").pipe_file(f"/listed-{mark}/{path.name}", path.read_bytes())
    monkeypatch.setattr(MemoryFileSystem, "info", info)
    monkeypatch.setattr(MemoryFileSystem, "_open", open_)
    cache = ShardCache(tmp_path / "cache")
    urls = expand(f"memory://listed-{mark}/*.tar")
    known = [cache.identify(url) for url in urls]
    # S3 says VersionId where the listing says Key
    other = "VersionId"
    for _ in range(2):
        for url, promised in zip(urls, known, strict=True):
            assert cache.local_tar(url, promised) == cache.path(url, promised)
    # a copy under another name would not be found again
    assert len(opened) == len(urls) == 3


@pytest.mark.parametrize("pins", [True, False])
def test_an_object_that_was_replaced_is_no_copy_of_the_one_in_a_listing(
    pins: bool, tmp_path: Path, quick: ShardCache, monkeypatch: pytest.MonkeyPatch
):
    facts_of, open_file, store = MemoryFileSystem.info, MemoryFileSystem._open, fsspec.filesystem("memory")
    url, place = f"memory://replaced/{pins}.tar", f"/replaced/{pins}.tar"
    old, new = (write_tar(tmp_path / "a.tar", sample(key)).read_bytes() for key in ("old", "new"))
    assert len(old) == len(new)
    store.pipe_file(place, old)
    known, listed = quick.identify(url), {place: store.info(place)}
    store.pipe_file(place, new)

    def info(filesystem: MemoryFileSystem, path: str, **options: Any) -> dict[str, Any]:
        return listed.get(path) or facts_of(filesystem, path, **options)

    def open_(filesystem: MemoryFileSystem, path: str, *given: Any, **options: Any) -> Any:
        # S3 is asked for what the listing named, others give what there is
        if pins and path in listed:
            raise OSError("no longer exists")
        return open_file(filesystem, path, *given, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    monkeypatch.setattr(MemoryFileSystem, "_open", open_)
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda _, path: listed.pop(path, None))
    copy = quick.local_tar(url, known)
    assert copy.read_bytes() == new
    assert copy == quick.path(url, quick.identify(url)) != quick.path(url, known)
    (event,) = quick.events.drain()
    assert event.name == "fetch_retries"


def test_what_a_shard_has_become_is_fetched_once_for_all(shards: Path, server: Faults, quick: ShardCache):
    url = f"{server.url}/00000.tar"
    known = quick.identify(url)
    (shards / "00002.tar").replace(shards / "00000.tar")
    others = [ShardCache(quick.folder, retries=STEADY) for _ in range(3)]
    copies = {cache.local_tar(url, known) for cache in (quick, *others)}
    assert [copy.read_bytes() for copy in copies] == [(shards / "00000.tar").read_bytes()]
    assert server.gets() == {"00000.tar": 1}
    (event,) = quick.events.drain()
    assert event == ("changed_shards", "shard 00000.tar has changed since it was counted")
    assert not [event for cache in others for event in cache.events.drain()]


def test_a_store_is_read_in_blocks_that_a_slow_line_brings_in_time(
    quick: ShardCache, monkeypatch: pytest.MonkeyPatch
):
    open_file, blocks = MemoryFileSystem._open, []

    def open_(filesystem: MemoryFileSystem, path: str, mode: str, block_size: int, **options: Any) -> Any:
        blocks.append(block_size)
        return open_file(filesystem, path, mode, block_size, **options)

    fsspec.filesystem("memory").pipe_file("/blocks/a.tar", b"a")
    monkeypatch.setattr(MemoryFileSystem, "_open", open_)
    quick.local_tar("memory://blocks/a.tar")
    # what is waited for, of a silence in all
    assert 0 < blocks[0] <= 2 * _SLOWEST * RetryPolicy().timeout_seconds


def test_a_folder_is_no_shard(tmp_path: Path):
    fsspec.filesystem("memory").pipe_file("/no-shard/web/a.tar", b"a")
    with pytest.raises(UserError, match="web is a folder: end it with a slash"):
        local_tar("memory://no-shard/web", tmp_path / "cache")


def test_many_askers_at_once_fetch_once(shards: Path, tmp_path: Path):
    log = tmp_path / "log"
    url = f"pipe:echo started >> {log}; cat {shards}/00000.tar"
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: local_tar(url, tmp_path / "cache"), range(8)))
    (path,) = paths
    assert path.read_bytes() == (shards / "00000.tar").read_bytes()
    assert len(list(path.parent.glob("*.tar"))) == 1
    assert not list(path.parent.glob("*.part"))


def _gzipped(path: Path, change: slice | None = None, keep: int | None = None) -> Path:
    packed = bytearray(gzip.compress(path.read_bytes(), mtime=0))
    if change is not None:
        packed[change] = bytes(255 - byte for byte in packed[change])
    target = path.with_suffix(".tar.gz")
    target.write_bytes(packed[:keep])
    return target


def test_gzip_is_unpacked_once(shards: Path, tmp_path: Path):
    packed = _gzipped(shards / "00000.tar")
    got = local_tar(str(packed), tmp_path / "cache")
    assert got.read_bytes() == (shards / "00000.tar").read_bytes()
    assert not was_damaged(got)
    written = got.stat().st_mtime_ns
    assert local_tar(str(packed), tmp_path / "cache").stat().st_mtime_ns == written


def test_gzip_in_several_streams_and_through_a_pipe(tmp_path: Path):
    content = write_tar(tmp_path / "a.tar", sample("a")).read_bytes()
    packed = gzip.compress(content[:700]) + gzip.compress(content[700:]) + b"\0" * 100
    (tmp_path / "b.tgz").write_bytes(packed)
    for shard in (str(tmp_path / "b.tgz"), f"pipe:cat {tmp_path}/b.tgz"):
        got = local_tar(shard, tmp_path / "cache")
        assert got.read_bytes() == content
        assert not was_damaged(got)


def test_a_torn_gzip_is_kept_as_far_as_it_goes(shards: Path, tmp_path: Path):
    whole = (shards / "00002.tar").read_bytes()
    packed = _gzipped(shards / "00002.tar", keep=1500)
    got = local_tar(str(packed), tmp_path / "cache")
    assert was_damaged(got)
    assert whole.startswith(got.read_bytes())
    assert got.stat().st_size > 1000
    assert local_tar(str(packed), tmp_path / "cache") == got


def test_a_gzip_with_a_wrong_checksum_keeps_all_and_is_damaged(shards: Path, tmp_path: Path):
    got = local_tar(str(_gzipped(shards / "00002.tar", change=slice(-8, -4))), tmp_path / "cache")
    assert was_damaged(got)
    assert got.read_bytes() == (shards / "00002.tar").read_bytes()
