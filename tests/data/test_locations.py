"""Patterns and URLs."""

import os
import tempfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from siglip_train.data.remote.locations import beside, cache_folder, check_local, default_cache, expand
from siglip_train.errors import UserError
from tests.data.shard_files import write_shards


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
        ("nosuchprotocol://x/{0..2}.tar", "nosuchprotocol"),
        ([], "empty"),
        ("http://nowhere/{00..", "cannot expand the braces of http"),
        ("pipe:cat {0..", "cannot expand the braces of pipe"),
    ],
)
def test_what_matches_nothing_is_named(pattern: str | list[str], named: str):
    with pytest.raises(UserError, match=named):
        expand(pattern)


def test_a_remote_folder_is_what_ends_in_a_slash():
    store = fsspec.filesystem("memory")
    for name in ("b.tar", "a.tgz", "c.tar.gz", "index.json", "below/d.tar"):
        store.pipe_file(f"/folder/web/{name}", b"")
    assert _names(expand("memory://folder/web/")) == ["a.tgz", "b.tar", "c.tar.gz"]
    assert expand("memory://folder/web/") == expand("memory://folder/{web,web/below}/")[:3]
    with pytest.raises(UserError, match=r"no shard matches memory://folder/$"):
        expand("memory://folder/")


@pytest.mark.parametrize("url", ["memory://bucket/*.tar", "memory://bucket/web/"])
def test_a_store_that_does_not_list_gets_one_line(url: str, monkeypatch: pytest.MonkeyPatch):
    def glob(*_: object) -> None:
        raise RuntimeError("Unable to\nlocate credentials")

    monkeypatch.setattr(MemoryFileSystem, "glob", glob)
    with pytest.raises(UserError) as found:
        expand(url)
    assert str(found.value) == f"cannot list {url}: RuntimeError: Unable to locate credentials"


def test_what_is_local_can_be_checked_without_a_network(shards: Path):
    there = f"{shards}/*.tar"
    check_local([there, f"http://nowhere.invalid/a.tar::{there}", "s3://nowhere/*.tar", "pipe:false"])
    with pytest.raises(UserError, match=r"nowhere\.tar"):
        check_local(f"{there}::nowhere.tar")


def test_an_empty_folder_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=str(tmp_path)):
        expand(str(tmp_path))


def test_the_default_cache_is_the_users_own():
    assert default_cache().name.startswith("siglip-train-")


@pytest.fixture
def usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The usual folder of the cache, in a temporary folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return default_cache()


@pytest.mark.parametrize("mode", [None, 0o755, 0o700])
def test_the_usual_cache_is_for_its_user_alone(usual: Path, mode: int | None) -> None:
    if mode is not None:
        usual.mkdir()
        usual.chmod(mode)
    assert cache_folder(None) == usual
    assert usual.stat().st_mode & 0o777 == 0o700


def test_a_usual_cache_that_others_may_have_filled_is_refused(
    usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    usual.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="it is a link"):
        cache_folder(None)
    usual.unlink()
    usual.mkdir()
    usual.chmod(0o777)
    with pytest.raises(UserError, match="others may write to it"):
        cache_folder(None)
    usual.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match=r"belongs to another user \(id \d+\).*data\.cache_dir"):
        cache_folder(None)
    # what a user names may be shared
    assert cache_folder(str(usual)) == usual


def test_files_beside_a_shard():
    assert beside("https://host/web/a.tar", "index.json") == "https://host/web/index.json"
    assert beside("https://host/a.tar?key=/x", "index.json") == "https://host/index.json?key=/x"
    assert beside("s3://bucket/a.tar", "index.json") == "s3://bucket/index.json"
    assert beside("pipe:cat x/a.tar", "index.json") is None
