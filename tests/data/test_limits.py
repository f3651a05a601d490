"""Small files that claim gigabytes are bad samples, before they take memory or disk."""

import io
import json
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from siglip_train.data.image_file import Encoded, decode
from siglip_train.data.remote import cache as caches
from siglip_train.data.remote import limits
from siglip_train.data.remote.cache import ShardCache, UnavailableShardError, local_tar
from siglip_train.data.remote.limits import MAX_PIXELS, MAX_TEXT_BYTES, Limits, OversizedError
from siglip_train.data.remote.retry import RetryPolicy
from siglip_train.data.shards import scan as scanning
from siglip_train.data.shards import tar
from siglip_train.data.shards.faults import BadSample
from siglip_train.data.shards.fields import CaptionChoice, Field
from siglip_train.data.shards.index_shards import index_shards
from siglip_train.data.shards.labels import labels_of
from siglip_train.data.shards.reader import RawSample, ShardReader, Wanted
from siglip_train.data.shards.scan import scan
from siglip_train.data.shards.tar_members import BrokenTarError
from siglip_train.errors import SampleError, UserError
from tests.data import bombs
from tests.data.conftest import encoded, picture
from tests.data.shard_files import sample, write_tar

SIDE = 13_000  # 169 million pixels, which Pillow takes
WANTED = Wanted(("png",), ("txt",))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: bombs.png(SIDE, SIDE, rows=10), "image too large"),
        (lambda: bombs.webp_animation(16_000), "image too large"),
        (lambda: bombs.gif(65_535), "image too large"),
        (lambda: bombs.gif_frame(SIDE), "image too large"),
        (lambda: bombs.jpeg_of_scans(300), "image too large"),
        # of a format in which the size that is said need not be that of what is inside
        (lambda: bombs.icon(2000), "broken image"),
    ],
)
def test_a_bomb_is_a_bad_picture_before_it_takes_memory(make: Callable[[], bytes], cause: str) -> None:
    data = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SampleError) as refused:
        decode(data)
    assert refused.value.cause == cause
    # KiB; the smallest of them would take 100 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_the_limit_of_pixels_can_be_raised() -> None:
    data = encoded(picture())
    with pytest.raises(SampleError, match="image too large"):
        decode(data, 10)
    assert decode(data, MAX_PIXELS).size == picture().size
    assert Encoded(bombs.jpeg_of_scans(20)).image().size == (64, 64)


def test_a_packed_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = bombs.gzip_of_zeros(tmp_path / "bomb.tar.gz", 100)
    with pytest.raises(
        UserError, match=r"cannot read shard .*bomb\.tar\.gz: its 0\.0\d+ MiB unpack to more than 64 MiB"
    ):
        local_tar(str(bomb), tmp_path / "cache")
    # neither is there more than a moment of it
    assert not list((tmp_path / "cache" / "copies").iterdir())
    other = ShardCache(tmp_path / "cache", limits=Limits(unpack_ratio=2000))
    assert other.local_tar(str(bomb)).stat().st_size == 100 << 20
    small = ShardCache(tmp_path / "cache2", limits=Limits(unpack_ratio=2000, unpack_gib=0.05))
    with pytest.raises(OversizedError, match=r"more than 51\.2 MiB"):
        small.local_tar(str(bomb))


def test_a_packed_bomb_among_good_shards_counts_as_bad(tmp_path: Path) -> None:
    write_tar(tmp_path / "good.tar", sample("a"))
    bombs.gzip_of_zeros(tmp_path / "bomb.tar.gz", 100, (tmp_path / "good.tar").read_bytes()[:2048])
    (shards,) = index_shards(
        [f"{tmp_path}/good.tar::{tmp_path}/bomb.tar.gz"], [WANTED], ShardCache(tmp_path / "cache")
    )
    assert len(shards) == 1
    (bad,) = shards.excluded
    assert (bad.shard, bad.cause) == ("bomb.tar.gz", "shard too large")
    assert "data.max_unpack_ratio" in bad.detail


def test_a_remote_packed_bomb_is_unavailable(tmp_path: Path) -> None:
    bomb = bombs.gzip_of_zeros(tmp_path / "bomb.tar.gz", 100)
    cache = ShardCache(tmp_path / "cache", retries=RetryPolicy(5, 1))
    with pytest.raises(UnavailableShardError, match="unpack to more than"):
        cache.local_tar(f"pipe:cat {bomb}")
    assert not list((tmp_path / "cache" / "copies").iterdir())


def test_a_huge_member_is_not_read(tmp_path: Path) -> None:
    path = bombs.tar_with_a_huge_member(tmp_path / "a.tar", "a", 3)
    (shards,) = index_shards([str(path)], [WANTED], ShardCache(tmp_path / "cache"))
    assert len(shards) == 2
    reader = ShardReader(shards)
    assert reader.read(0, 0).members["txt"] == b"a good one"
    with pytest.raises(SampleError, match="member too large") as refused:
        reader.read(0, 1)
    assert "data.max_member_mib" in refused.value.detail


def test_a_tar_of_countless_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_MAX_MEMBERS", 5)
    write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"") for n in range(6)])
    with pytest.raises(BrokenTarError, match="more than 5 members"):
        scan(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"[" * 200_000, "broken json"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "broken json"),
        (b'{"caption": ' + b"9" * 100_000 + b"}", "broken json"),
        (b"[" + b"[]," * (MAX_TEXT_BYTES // 3 + 1) + b"[]]", "json too long"),
    ],
)
def test_json_made_to_fill_memory_is_broken(content: bytes, cause: str) -> None:
    with pytest.raises(SampleError) as refused:
        CaptionChoice("json:caption").draw(
            RawSample("a.tar", "a", {"json": content}), np.random.default_rng(0)
        )
    assert refused.value.cause == cause


def test_a_text_made_to_fill_memory_is_bad_and_a_long_one_is_cut() -> None:
    raw = RawSample("a.tar", "a", {"txt": b"a" * (MAX_TEXT_BYTES + 1)})
    with pytest.raises(SampleError, match="text too long"):
        Field.parse("txt").texts(raw)


def test_what_a_stranger_wrote_is_not_logged_at_any_length() -> None:
    bad = BadSample.of("a.tar", "a", SampleError("bad label", "x" * 10_000_000))
    assert len(str(bad)) < 1000


def test_an_endless_index_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MAX_INDEX_BYTES", 1000)
    (tmp_path / "index.json").write_text(json.dumps(["x" * 2000]))
    with pytest.raises(UserError, match="longer than 1000 bytes"):
        ShardCache(tmp_path / "cache").read_small(f"file://{tmp_path}/index.json")


def test_a_label_vector_that_claims_gigabytes_is_bad() -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    raw = RawSample("a.tar", "a", {"npy": header.getvalue()})
    with pytest.raises((SampleError, MemoryError)):
        labels_of(Field.parse("npy"), raw)


def test_links_and_paths_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    """Nothing is extracted: names are keys, and links and devices are no samples."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind, name in (
            (tarfile.SYMTYPE, "b.png"),
            (tarfile.LNKTYPE, "c.png"),
            (tarfile.CHRTYPE, "d.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in ("../../x.png", "/etc/x.txt", "..\\x.png"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"data"))
    index = scan(path)
    assert [index.key(number) for number in range(len(index))] == ["../../x", "/etc/x"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_limits_are_above_what_real_shards_need() -> None:
    usual = Limits()
    assert usual.unpacked(2 << 20) == 2 * 200 << 20
    assert usual.unpacked(10) == 64 << 20
    assert usual.unpacked(1 << 40) == 64 << 30
    assert usual == limits.USUAL_LIMITS


def test_an_endless_list_of_parts_ends(tmp_path: Path) -> None:
    for content in (b"9" * 100_000, b"99999999\n" + b"1\n" * 1_000_000, b"-1\n", b"x\n"):
        path = tmp_path / "list"
        path.write_bytes(content)
        with path.open("rb") as file, pytest.raises(ValueError, match=r"no end|int"):
            tar._sparse_parts(file.fileno(), 0)
