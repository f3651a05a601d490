"""Patterns, URLs, gzip and the download cache."""

import functools
import gzip
import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from siglip_train.data.cache import local_tar, was_damaged
from siglip_train.data.locations import default_cache, expand
from siglip_train.data.tar import scan
from siglip_train.errors import UserError
from tests.data.shard_files import sample, write_shards, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards in a folder."""
    write_shards(tmp_path / "in", [2, 1, 3])
    return tmp_path / "in"


def _names(found: list[str]) -> list[str]:
    return [Path(name).name for name in found]


def test_every_way_to_write_shards(shards: Path):
    every = ["00000.tar", "00001.tar", "00002.tar"]
    assert _names(expand(f"{shards}/{{00000..00002}}.tar")) == every
    assert _names(expand(f"{shards}/*.tar")) == every
    assert _names(expand(str(shards))) == every
    assert _names(expand([f"{shards}/00002.tar", f"{shards}/0000[01].tar"])) == ["00002.tar", *every[:2]]
    assert _names(expand(f"{shards}/00001.tar::{shards}/00000.tar")) == ["00001.tar", "00000.tar"]
    assert _names(expand(f"{shards}/0000{{0,1}}*.tar")) == every[:2]
    assert expand("http://host/{a,b}.tar") == ["http://host/a.tar", "http://host/b.tar"]
    assert expand("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    assert _names(expand(f"file://{shards}/*.tar")) == every


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("nowhere/*.tar", r"nowhere/\*.tar"),
        ("nowhere/{0..2}.tar", "nowhere/0.tar"),
        ("nowhere.tar", "nowhere.tar"),
        ("memory://nowhere/*.tar", "nowhere"),
        ("nosuchprotocol://x/*.tar", "nosuchprotocol"),
        ([], "empty"),
    ],
)
def test_what_matches_nothing_is_named(pattern: str | list[str], named: str):
    with pytest.raises(UserError, match=named):
        expand(pattern)


def test_an_empty_folder_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=str(tmp_path)):
        expand(str(tmp_path))


def test_a_local_plain_tar_is_used_where_it_is(shards: Path, tmp_path: Path):
    assert local_tar(str(shards / "00000.tar"), tmp_path / "cache") == shards / "00000.tar"
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves the shards; gives its address and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/torn.tar":
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(b"only this")
                return
            super().do_GET()

        def log_message(self, *args: object) -> None:
            """Silent."""

    handler = functools.partial(Handler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


@pytest.mark.parametrize("kind", ["http", "pipe", "file", "memory"])
def test_remote_shards_arrive_as_they_are(kind: str, shards: Path, tmp_path: Path, server: tuple):
    path = shards / "00002.tar"
    with fsspec.open("memory://bucket/00002.tar", "wb") as out:
        out.write(path.read_bytes())
    url = {
        "http": f"{server[0]}/00002.tar",
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


def test_many_askers_at_once_fetch_once(shards: Path, tmp_path: Path):
    log = tmp_path / "log"
    url = f"pipe:echo started >> {log}; cat {shards}/00000.tar"
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: local_tar(url, tmp_path / "cache"), range(8)))
    (path,) = paths
    assert path.read_bytes() == (shards / "00000.tar").read_bytes()
    assert len(list(path.parent.glob("*.tar"))) == 1
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(
    "url", ["pipe:exit 3", "pipe:printf half; exit 1", "{server}/missing.tar", "memory://no/such.tar"]
)
def test_what_cannot_be_fetched_is_named_and_not_kept(
    url: str, server: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    url = url.format(server=server[0])
    with pytest.raises(UserError, match="cannot read shard"):
        local_tar(url, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_lost_connection_is_tried_again_and_never_taken_for_a_shard(
    server: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"torn\.tar"):
        local_tar(f"{server[0]}/torn.tar", tmp_path / "cache")
    assert server[1] == ["/torn.tar"] * 6
    assert not list((tmp_path / "cache").rglob("*.tar"))


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


def test_the_default_cache_is_the_users_own():
    assert default_cache().name.startswith("siglip-train-")
