"""The index of a tar: formats, grouping, damage, reuse."""

import os
import tarfile
from pathlib import Path

import pytest

from siglip_train.data.tar import BrokenTarError, TarIndex, load_index, scan
from tests.data.shard_files import Member, sample, write_tar

LONG = "a/" + "long" * 60


def _contents(path: Path, index: TarIndex) -> list[tuple[str, dict[str, bytes]]]:
    data = path.read_bytes()
    return [
        (
            index.key(i),
            {
                extension: data[index.offsets[m] : index.offsets[m] + index.sizes[m]]
                for extension, m in index.members(i).items()
            },
        )
        for i in range(len(index))
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_found_where_it_is(tmp_path: Path, format: int):
    names = ["a", "folder/b", "x" * 90, "ünï"]
    if format != tarfile.USTAR_FORMAT:
        names.append(LONG)
    members = [m for number, name in enumerate(names) for m in sample(name, number)]
    path = write_tar(tmp_path / "a.tar", members, format)
    expected: dict[str, dict[str, bytes]] = {}
    for name, data in members:
        key, _, extension = name.rpartition(".")
        expected.setdefault(key, {})[extension] = data
    assert _contents(path, scan(path)) == list(expected.items())


def test_a_prefix_of_ustar_belongs_to_the_name(tmp_path: Path):
    name = "/".join(["folder" * 5] * 4) + "/key.png"
    index = scan(write_tar(tmp_path / "a.tar", [(name, b"1")]))
    assert index.key(0) == name[: -len(".png")]


def test_samples_end_at_the_first_dot_of_the_file_name(tmp_path: Path):
    members: list[Member] = [
        ("v1.0/a.PNG", b"1"), ("v1.0/a.mask.png", b"2"), ("v1.0/a.txt", b"3"), (".hidden.png", b"4"),
        ("noextension", b"5"), ("v1.0/b.txt", b"6"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    assert _contents(path, scan(path)) == [
        ("v1.0/a", {"png": b"1", "mask.png": b"2", "txt": b"3"}), ("v1.0/b", {"txt": b"6"}),
    ]  # fmt: skip


def test_folders_and_links_are_no_members(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("a", tarfile.DIRTYPE),
            ("a/b.txt", tarfile.SYMTYPE),
            ("a/c.txt", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
    assert [key for key, _ in _contents(path, scan(path))] == ["a/c"]


def test_split_and_repeated_samples_are_separate_and_counted(tmp_path: Path):
    members = [("a.png", b"1"), ("b.txt", b"2"), ("a.txt", b"3"), ("c.png", b"4"), ("c.png", b"5")]
    path = write_tar(tmp_path / "a.tar", members)
    index = scan(path)
    assert [key for key, _ in _contents(path, index)] == ["a", "b", "a", "c", "c"]
    assert index.repeated == 2


def test_find_prefers_the_first_extension(tmp_path: Path):
    members = [("a.png", b""), ("a.jpg", b""), ("b.png", b""), ("c.txt", b"")]
    assert scan(write_tar(tmp_path / "a.tar", members)).find(("jpg", "png")).tolist() == [1, 2, -1]


def _three(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", [m for i in range(3) for m in sample(f"{i:05d}", i)])


def test_a_torn_sample_is_left_out_and_named(tmp_path: Path):
    path = _three(tmp_path)
    whole = scan(path)
    last = whole.members(2)
    content = path.read_bytes()
    cuts = [
        int(whole.offsets[last["txt"]]) + 3,  # in the data of a member
        int(whole.offsets[last["txt"]]) - 512 + 100,  # in a header
        int(whole.offsets[last["json"]]),  # between a header and its data
    ]
    for cut in cuts:
        path.write_bytes(content[:cut])
        index = scan(path)
        assert [index.key(i) for i in range(len(index))] == ["00000", "00001"]
        assert index.torn.tolist() == ["00002"]


def test_rubbish_after_a_sample_ends_the_tar_there(tmp_path: Path):
    path = _three(tmp_path)
    second = int(scan(path).offsets[3]) - 512
    content = bytearray(path.read_bytes())
    content[second : second + 512] = b"rubbish " * 64
    path.write_bytes(content)
    index = scan(path)
    # which member the rubbish was cannot be known: the sample before it is not trusted
    assert (len(index), index.torn.tolist()) == (0, ["00000"])


def test_a_tar_without_its_end_marker_is_whole(tmp_path: Path):
    path = _three(tmp_path)
    path.write_bytes(path.read_bytes().rstrip(b"\0"))
    assert (len(scan(path)), scan(path).torn.tolist()) == (3, [])


def test_an_empty_file_has_no_samples(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"")
    assert len(scan(tmp_path / "a.tar")) == 0


@pytest.mark.parametrize("content", [b"PK\3\4 a zip" * 100, b"short"])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(BrokenTarError):
        scan(tmp_path / "a.tar")
    with pytest.raises(BrokenTarError):
        load_index(tmp_path / "missing.tar", tmp_path)


def test_a_kept_index_is_used_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, cache = _three(tmp_path), tmp_path / "cache"
    first = load_index(path, cache)
    with monkeypatch.context() as patch:
        patch.setattr("siglip_train.data.tar.scan", lambda path: pytest.fail("scanned again"))
        again = load_index(path, cache)
    assert _contents(path, again) == _contents(path, first)
    write_tar(path, sample("other"))
    os.utime(path, ns=(1, 1))
    assert load_index(path, cache).key(0) == "other"
    assert not list(cache.rglob("tmp*.part"))


def test_a_damaged_kept_index_is_made_again(tmp_path: Path):
    path, cache = _three(tmp_path), tmp_path / "cache"
    load_index(path, cache)
    (kept,) = cache.rglob("*.npz")
    kept.write_bytes(b"damaged")
    assert len(load_index(path, cache)) == 3
