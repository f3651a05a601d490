"""The index of a tar: formats, grouping, damage, reuse."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from siglip_train.data.shards.kept_index import load_index
from siglip_train.data.shards.scan import scan
from siglip_train.data.shards.tar import TarIndex, read_member
from siglip_train.data.shards.tar_members import BrokenTarError
from siglip_train.errors import SampleError
from tests.data.shard_files import Member, sample, sparse_member, write_tar

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


def test_rubbish_costs_the_samples_around_it_and_no_more(tmp_path: Path):
    path = _three(tmp_path)
    second = int(scan(path).offsets[3]) - 512
    content = bytearray(path.read_bytes())
    content[second : second + 512] = b"rubbish " * 64
    path.write_bytes(content)
    index = scan(path)
    # which member the rubbish was cannot be known: the sample before it is not trusted, the one after lacks its image
    assert (index.torn.tolist(), index.torn_causes.tolist()) == (["00000"], ["truncated"])
    assert [(key, *members) for key, members in _contents(path, index)] == [
        ("00001", "txt", "json"), ("00002", "png", "txt", "json"),
    ]  # fmt: skip


def test_a_flipped_bit_in_a_header_costs_one_sample(tmp_path: Path):
    path = _three(tmp_path)
    content = path.read_bytes()
    for member in range(9):
        header = int(scan(path).offsets[member]) - 512
        for place in (6, 104, 130, 140, 150, 156, 400):
            damaged = bytearray(content)
            damaged[header + place] ^= 1
            (tmp_path / "damaged.tar").write_bytes(damaged)
            index = scan(tmp_path / "damaged.tar")
            whole = [key for key, members in _contents(tmp_path / "damaged.tar", index) if len(members) == 3]
            assert whole == [f"0000{i}" for i in range(3) if i != member // 3]
            assert index.torn.tolist() == [f"0000{member // 3}"]
            assert index.torn_causes.tolist() == ["broken header"]


def test_a_tar_without_the_beginning_is_read_from_its_first_header(tmp_path: Path):
    path = _three(tmp_path)
    path.write_bytes(path.read_bytes()[700:])
    index = scan(path)
    assert [index.key(i) for i in range(len(index))][-2:] == ["00001", "00002"]
    assert index.torn.tolist() == ["?"]


def test_old_headers_without_magic_and_with_signed_checksums(tmp_path: Path):
    path = _three(tmp_path)
    content = bytearray(path.read_bytes())
    for offset in (0, int(scan(path).offsets[1]) - 512):
        header = content[offset : offset + 512]
        header[257:265] = bytes(8)
        header[4] = 0xFC  # ü in a name of old
        header[148:156] = b" " * 8
        header[148:155] = b"%06o\0" % (sum(header) - 256)
        content[offset : offset + 512] = header
    path.write_bytes(content)
    assert scan(path).torn.tolist() == []
    assert len(scan(path)) == 4


def test_what_follows_the_end_is_not_read_but_told(tmp_path: Path):
    path = _three(tmp_path)
    path.write_bytes(path.read_bytes() * 2)
    index = scan(path)
    assert (len(index), index.torn.tolist(), index.torn_causes.tolist()) == (3, ["?"], ["data after the end"])


def test_a_tar_without_its_end_marker_is_whole(tmp_path: Path):
    path = _three(tmp_path)
    path.write_bytes(path.read_bytes().rstrip(b"\0"))
    assert (len(scan(path)), scan(path).torn.tolist()) == (3, [])


def test_an_empty_file_has_no_samples(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"")
    assert len(scan(tmp_path / "a.tar")) == 0


def _pax_header(records: bytes) -> bytes:
    """An extended header with these records, right or wrong."""
    info = tarfile.TarInfo("PaxHeader")
    info.size, info.type = len(records), tarfile.XHDTYPE
    return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")


@pytest.mark.parametrize(
    "records",
    [
        b"-5 path=b.txt\n", b"0 path=b.txt\n", b"x", b" ", b"14 path=b.txt", b"99 path=b.txt\n", b"7 path\n",
        b"14 size=-3000\n", b"11 size=ab\n", b"12 size=512\n", b"24 size=999999999999999\n",
    ],
)  # fmt: skip
def test_damaged_pax_records_cost_one_sample(tmp_path: Path, records: bytes):
    path = tmp_path / "a.tar"
    a, b, c = (write_tar(path, sample(key, number)).read_bytes() for number, key in enumerate("abc"))
    # what is left of a without the zeros at its end is whole blocks, since its json is short
    body = -(-len(a.rstrip(b"\0")) // 512) * 512
    path.write_bytes(a[:body] + _pax_header(records) + b[:body] + c)
    index = scan(path)
    whole = [key for key, members in _contents(path, index) if len(members) == 3]
    assert whole == ["a", "c"]
    assert index.torn.tolist() == ["b"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("member", range(9))
def test_a_damaged_header_of_a_long_name_costs_one_sample(tmp_path: Path, format: int, member: int):
    members = [m for i in range(3) for m in sample("k" * 120 + f"{i}", i)]
    path = write_tar(tmp_path / "a.tar", members, format)
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        content[archive.getmembers()[member].offset + 140] ^= 1
    path.write_bytes(content)
    index = scan(path)
    assert len(index.torn) == 1
    assert index.torn_causes.tolist() == ["broken header"]
    whole = [key[-1] for key, found in _contents(path, index) if len(found) == 3]
    # a name cut off at 100 bytes does not tell whose the member was: that of the sample before, or of the next
    assert set("012") - set(whole) <= {str(member // 3), str((member - 1) // 3)}


def test_a_name_that_damage_has_made_that_of_the_next_sample(tmp_path: Path):
    long = "k" * 120
    members = [m for i in range(3) for m in sample(f"{long}{i}", i)]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "a.tar", members, format)
        # the json of 0 becomes one of 1, the image of 2 one of 1: long names have no checksum
        for old, new in ((f"{long}0.json", f"{long}1.json"), (f"{long}2.png", f"{long}1.png")):
            path = write_tar(tmp_path / "a.tar", members, format)
            path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
            index = scan(path)
            assert set(index.torn_causes.tolist()) == {"repeated member"}
            assert set(index.torn.tolist()) == {f"{long}1"}
            for key, found in _contents(path, index):
                assert all((f"{key}.{extension}", data) in members for extension, data in found.items())


def test_equal_neighbours_of_one_key_are_kept(tmp_path: Path):
    index = scan(write_tar(tmp_path / "a.tar", [*sample("a", 1), *sample("a", 2)]))
    assert (len(index), index.repeated, index.torn.tolist()) == (2, 1, [])


def _with_holes(name: str, parts: dict[int, bytes], size: int) -> tuple[tarfile.TarInfo, bytes]:
    """A file as `tar --format=posix -S` and bsdtar write it: a list of the parts, then what is in them."""
    numbers = [len(parts), *(number for place, data in parts.items() for number in (place, len(data)))]
    listed = "".join(f"{number}\n" for number in numbers).encode()
    content = listed + b"\0" * (-len(listed) % 512) + b"".join(parts.values())
    info = tarfile.TarInfo(f"./GNUSparseFile.8440/{name}")
    info.size = len(content)
    info.pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": str(size),
    }  # fmt: skip
    return info, content


def test_files_with_holes(tmp_path: Path):
    """Their names in the headers are those of a file that other readers are to unpack."""
    path = tmp_path / "a.tar"
    parts = [{0: b"start", 3000: b"middle"}, {100 * n: b"x" for n in range(300)}, {}, {700: b"y" * 300}]
    holed = [_with_holes(f"0000{number}.npy", each, size) for number, (each, size) in
             enumerate(zip(parts, (5000, 50_000, 700, 1000), strict=True))]  # fmt: skip
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number, (info, content) in enumerate(holed):
            for name, data in (*sample(f"0000{number}", number), (info, content)):
                member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    index = scan(path)
    assert [index.key(row) for row in range(len(index))] == ["00000", "00001", "00002", "00003"]
    with tarfile.open(path) as archive, path.open("rb") as file:
        for row in range(4):
            assert len(index.members(row)) == 4
            for extension, member in index.members(row).items():
                reader = archive.extractfile(f"0000{row}.{extension}")
                assert reader is not None
                assert read_member(index, file.fileno(), member) == reader.read()


@pytest.mark.parametrize(
    "change", [(b"2\n0\n5\n", b"9\n0\n5\n"), (b"2\n0\n5\n", b"2\nx\n5\n"), (b"3000\n", b"9000\n")]
)
def test_a_wrong_list_of_holes_is_a_bad_sample(tmp_path: Path, change: tuple[bytes, bytes]):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info, content = _with_holes("a.npy", {0: b"start", 3000: b"middle"}, 5000)
        archive.addfile(info, io.BytesIO(content.replace(*change)))
    index = scan(path)
    with path.open("rb") as file, pytest.raises(SampleError, match="0 of 5000 bytes"):
        read_member(index, file.fileno(), 0)


@pytest.mark.parametrize("blocks", [0, 2])
def test_files_with_holes_in_gnus_own_form_are_named(tmp_path: Path, blocks: int):
    before, behind = (write_tar(tmp_path / name, sample(name)).read_bytes() for name in "ac")
    path = tmp_path / "all.tar"
    end = before.rstrip(b"\0")
    path.write_bytes(end + b"\0" * (-len(end) % 512) + sparse_member("b.npy", blocks) + behind)
    index = scan(path)
    assert [key for key, _ in _contents(path, index)] == ["a", "c"]
    assert (index.torn.tolist(), index.torn_causes.tolist()) == (["b"], ["file with holes"])


@pytest.mark.parametrize("size", [10**12, -512, -1024])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_a_size_that_cannot_be(tmp_path: Path, size: int, kind: bytes):
    path = _three(tmp_path)
    content = path.read_bytes()
    place = int(scan(path).offsets[3]) - 512
    info = tarfile.TarInfo("00001.png")
    info.type, info.size = kind, max(size, 0)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        header[124:136] = b"%+012o" % size
        header[148:156] = b" " * 8
        header[148:155] = b"%06o\0" % sum(header)
    path.write_bytes(content[:place] + header + content[place + 512 :])
    index = scan(path)
    assert [key for key, members in _contents(path, index) if len(members) == 3][-1] == "00002"
    assert index.torn_causes.tolist() == ["truncated"]


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
        patch.setattr("siglip_train.data.shards.kept_index.scan", lambda path: pytest.fail("scanned again"))
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
