"""Counting complete samples, reading by number, on one and on several ranks."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from siglip_train.data.remote.cache import ShardCache
from siglip_train.data.shards.index_shards import index_shards
from siglip_train.data.shards.kept_index import load_index
from siglip_train.data.shards.reader import ShardReader, ShardSet, Wanted, read_samples
from siglip_train.data.shards.tar import TarIndex
from siglip_train.errors import SampleError, UserError
from tests.data.faulty_server import serve
from tests.data.shard_files import sample, without, write_index, write_shards, write_tar
from tests.ranks import run_ranks

WANTED = Wanted(("jpg", "png"), ("txt",))


def _indexed(shards: str | list[str], cache: str, wanted: Wanted = WANTED) -> ShardSet:
    (found,) = index_shards([shards], [wanted], ShardCache.at(cache))
    return found


def test_samples_are_read_by_number(tmp_path: Path, cache: str):
    shards = _indexed(write_shards(tmp_path, [2, 3]), cache)
    assert shards.counts.tolist() == [2, 3]
    for reader in (ShardReader(shards), pickle.loads(pickle.dumps(ShardReader(shards)))):
        got = reader.read(1, 2)
        assert (got.shard, got.key, got.name) == ("00001.tar", "00004", "00001.tar/00004")
        assert got.members == {"image": dict(sample("", 4))[".png"], "txt": b"caption 4"}
    assert [shards.locate(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def test_only_complete_samples_are_counted_and_the_others_named(tmp_path: Path, cache: str):
    members = [
        *sample("a", 0), *without(sample("b", 1), "png"), *without(sample("c", 2), "txt"), *sample("d", 3),
        *[(name.replace("png", "JPG"), data) for name, data in sample("e", 4)],
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    shards = _indexed(str(path), cache)
    reader = ShardReader(shards)
    assert [reader.read(0, i).key for i in range(3)] == ["a", "d", "e"]
    assert [bad[:3] for bad in shards.excluded] == [("a.tar", "b", "no image"), ("a.tar", "c", "no text")]


def test_any_of_several_texts_makes_a_sample_complete_and_no_text_may_be_wanted(tmp_path: Path, cache: str):
    members = [*without(sample("a"), "txt"), *without(sample("b"), "json"), ("c.png", b"")]
    path = str(write_tar(tmp_path / "a.tar", members))
    assert len(_indexed(path, cache, Wanted(("png",), ("txt", "json")))) == 2
    assert len(_indexed(path, cache, Wanted(("png",)))) == 3


def test_extra_members_are_read_where_they_are(tmp_path: Path, cache: str):
    path = write_tar(tmp_path / "a.tar", [*sample("a", cls=b"3"), *sample("b")])
    reader = ShardReader(_indexed(str(path), cache, Wanted(("png",), None, ("cls",))))
    assert reader.read(0, 0).members["cls"] == b"3"
    assert list(reader.read(0, 1).members) == ["image"]


def test_a_copy_that_makes_room_while_it_is_opened_is_made_again(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
):
    path = write_tar(tmp_path / "a.tar", sample("a"))
    reader = ShardReader(_indexed(f"pipe:cat {path}", cache))

    def removed_before(copy: Path, folder: Path) -> TarIndex:
        monkeypatch.undo()
        copy.unlink()
        return load_index(copy, folder)

    monkeypatch.setattr("siglip_train.data.shards.reader.load_index", removed_before)
    assert reader.read(0, 0).key == "a"


def test_a_torn_shard_counts_its_last_sample(tmp_path: Path, cache: str):
    path = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in sample(f"{i}", i)])
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[:-10])
    shards = _indexed(str(path), cache)
    assert len(shards) == 2
    assert [bad[:3] for bad in shards.excluded] == [("a.tar", "2", "truncated")]


def test_of_a_tar_that_has_become_shorter_no_half_caption_is_read(tmp_path: Path, cache: str):
    path = write_tar(tmp_path / "a.tar", without(sample("a", txt=b"a caption of some length"), "json"))
    reader = ShardReader(_indexed(str(path), cache))
    assert reader.read(0, 0).members["txt"] == b"a caption of some length"
    end = path.read_bytes().index(b" of some length")
    with path.open("r+b") as file:
        file.truncate(end)
    with pytest.raises(SampleError, match="truncated: 9 of 24 bytes"):
        reader.read(0, 0)


def test_unreadable_shards_are_all_named(tmp_path: Path, cache: str):
    write_shards(tmp_path, [1])
    for name in ("bad1.tar", "bad2.tar"):
        (tmp_path / name).write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"bad1\.tar.*bad2\.tar"):
        _indexed(str(tmp_path), cache)


def test_progress_is_told(tmp_path: Path, cache: str):
    told: list[tuple[int, int]] = []
    shards = write_shards(tmp_path, [1, 1, 1])
    index_shards([shards], [WANTED], ShardCache.at(cache), lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_more_shards_than_kept_open(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("siglip_train.data.shards.reader._DESCRIPTORS", 2)
    reader = ShardReader(_indexed(write_shards(tmp_path, [1] * 5), cache))
    for _ in range(2):
        assert [reader.read(shard, 0).key for shard in range(5)] == [f"{i:05d}" for i in range(5)]
    assert len(reader._descriptors) == 2


def test_raw_samples_come_in_file_order_with_all_members(tmp_path: Path, cache: str):
    got = list(read_samples(write_shards(tmp_path, [2, 1]), cache))
    assert [each.name for each in got] == ["00000.tar/00000", "00000.tar/00001", "00001.tar/00002"]
    assert got[1].members == {name[1:]: data for name, data in sample("", 1)}
    with pytest.raises(UserError):
        next(read_samples(__file__, cache))


def _survey_on_a_rank(shards: str | list[str], cache: str) -> tuple:
    found = _indexed(shards, cache)
    return found.counts, [ShardReader(found).read(shard, 0).key for shard in range(len(found.counts))]


def _failing_survey(shards: list[str], cache: str) -> str:
    try:
        _indexed(shards, cache)
    except UserError as error:
        return str(error)
    return "no error"


def _survey_of_what_a_rank_finds(folder: Path, cache: str) -> list[str] | str:
    try:
        return _indexed(str(folder / f"rank{dist.get_rank()}"), cache).urls
    except UserError as error:
        return str(error)


@pytest.mark.dist
def test_all_ranks_read_what_rank_0_finds(tmp_path: Path, cache: str):
    # as where a shard appears after rank 0 has looked
    write_shards(tmp_path / "rank0", [2, 1])
    write_shards(tmp_path / "rank1", [2, 1, 3])
    expected = [str(tmp_path / "rank0" / f"0000{shard}.tar") for shard in range(2)]
    assert run_ranks(2, _survey_of_what_a_rank_finds, tmp_path, cache) == [expected, expected]
    for path in (tmp_path / "rank0").iterdir():
        path.unlink()
    first, second = run_ranks(2, _survey_of_what_a_rank_finds, tmp_path, cache)
    assert first == second
    assert "no shard in folder" in first


@pytest.mark.dist
def test_ranks_share_the_scan_and_agree(tmp_path: Path, cache: str):
    pattern = write_shards(tmp_path / "in", [2, 1, 3, 1, 2])
    for counts, keys in run_ranks(2, _survey_on_a_rank, pattern, cache):
        np.testing.assert_array_equal(counts, [2, 1, 3, 1, 2])
        assert keys == ["00000", "00002", "00003", "00006", "00007"]


@pytest.mark.dist
def test_ranks_ask_for_the_index_beside_remote_shards_once(tmp_path: Path, cache: str):
    write_shards(tmp_path / "in", [2, 1, 3])
    files = sorted((tmp_path / "in").glob("*.tar"))
    write_index(tmp_path / "in")
    with serve(tmp_path / "in") as server:
        urls = [f"{server.url}/{file.name}" for file in files]
        for counts, keys in run_ranks(2, _survey_on_a_rank, urls, cache):
            np.testing.assert_array_equal(counts, [2, 1, 3])
            assert keys == ["00000", "00002", "00003"]
        # and the two ranks share the copies
        assert server.gets("") == {"index.json": 1, **{file.name: 1 for file in files}}


@pytest.mark.dist
def test_a_failure_on_one_rank_is_an_error_on_all(tmp_path: Path, cache: str):
    write_shards(tmp_path / "in", [2, 1])
    (tmp_path / "in" / "00001.tar").write_bytes(b"no tar" * 200)
    messages = run_ranks(2, _failing_survey, str(tmp_path / "in"), cache)
    assert messages[0] == messages[1]
    assert "00001.tar" in messages[0]
