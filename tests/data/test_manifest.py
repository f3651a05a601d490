"""The index beside shards: counts as a scan gives them, whoever asks for which members."""

import json
from pathlib import Path

import pytest

from siglip_train.data.shards.manifest import Entry, index_content, left_out_of, members_of, read_index
from siglip_train.data.shards.reader import Wanted
from siglip_train.data.shards.scan import scan
from tests.data.shard_files import sample, without, write_tar


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """Of a shard with samples of several kinds."""
    members = [
        *sample("a"), *sample("b"), *without(sample("c"), "txt"), *without(sample("d"), "png"),
        ("e.jpg", b""), ("e.txt", b""), ("f.j pg", b""), ("b.cls", b"1"),
    ]  # fmt: skip
    index = scan(write_tar(tmp_path / "a.tar", members))
    return Entry("a.tar", index.file_size, "0" * 64, 7, 2, members_of(index), repeated=index.repeated)


def test_samples_are_counted_by_their_members(entry: Entry):
    assert entry.members == {
        "json png txt": 2, "json png": 1, "json txt": 1, "jpg txt": 1, "j_pg": 1, "cls": 1,
    }  # fmt: skip
    assert entry.repeated == 1


@pytest.mark.parametrize(
    ("wanted", "complete", "lacking"),
    [
        (Wanted(("png",), ("txt",)), 2, {"no image": 4, "no text": 1}),
        (Wanted(("jpg", "png"), ("txt", "json")), 4, {"no image": 3}),
        (Wanted(("png",)), 3, {"no image": 4}),
        (Wanted(("jpg",), ("cls",)), 0, {"no image": 6, "no text": 1}),
    ],
)
def test_the_index_knows_what_a_source_will_find(entry: Entry, wanted: Wanted, complete: int, lacking: dict):
    assert entry.complete(wanted) == complete
    assert entry.incomplete(wanted) == lacking


def test_an_index_is_read_as_it_was_written_but_for_shards_that_could_not_be_opened(entry: Entry):
    broken = Entry("broken.tar", 0, "", 0, 0, {})
    text = json.dumps({**index_content([entry, broken]), "by": "whoever"})
    assert read_index(text) == {"a.tar": entry}
    assert json.loads(text)["samples"] == 7


def test_what_damage_has_cut_is_not_forgotten(tmp_path: Path):
    path = write_tar(tmp_path / "a.tar", [*sample("a"), *sample("b")])
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-5])
    index = scan(path)
    entry = Entry("a.tar", 1, "0", 1, 1, members_of(index), left_out_of(index))
    assert entry.complete(Wanted(("png",))) == 1
    assert entry.incomplete(Wanted(("png",))) == {"truncated": 1}


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"shards": [1]}', '{"shards": [{"file": "a.tar", "bytes": 1}]}'], ids=repr
)
def test_another_file_of_that_name_is_no_index(text: str):
    with pytest.raises(ValueError, match=r".+"):
        read_index(text)
