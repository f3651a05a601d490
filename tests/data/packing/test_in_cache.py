"""A folder or a table as a source: packed once a content, whoever asks, and anew after an edit."""

import csv
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from siglip_train.data.packing.in_cache import InCache, PackIntoCache
from siglip_train.data.packing.run_record import alone_in
from siglip_train.data.shards.reader import indexed_tar
from siglip_train.data.shards.select import Selection
from siglip_train.errors import UserError
from tests.data.conftest import encoded, picture
from tests.ranks import run_ranks

CLASSES = {"boot": 3, "coat": 4}


def class_folders(folder: Path) -> Path:
    for place, (name, count) in enumerate(CLASSES.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(encoded(picture(10 * place + number)))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of two classes."""
    return class_folders(tmp_path / "photos")


def packed(folder: Path, cache: Path, max_bad_share: float = 0.01) -> InCache:
    return PackIntoCache(str(folder), "mine", str(cache), 1, max_bad_share)(lambda: None)


def keys_of(found: InCache) -> list[str]:
    indexes = [
        indexed_tar(str(tar), Path(found.shards))[1] for tar in sorted(Path(found.shards).glob("*.tar"))
    ]
    return [index.key(sample) for index in indexes for sample in range(len(index))]


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "siglip_train")
    return caplog


def test_class_folders_are_packed_with_their_classes(folder: Path, tmp_path: Path, notes) -> None:
    found = packed(folder, tmp_path / "cache")
    assert found.classnames == ["boot", "coat"]
    assert found.by is None
    assert keys_of(found) == [
        f"{name}/{number}" for name, count in CLASSES.items() for number in range(count)
    ]
    assert f"source mine: 7 images of 2 classes (boot, coat) of {folder}, packed into" in notes.text


def test_the_same_content_is_packed_once_and_another_anew(folder: Path, tmp_path: Path, notes) -> None:
    cache = tmp_path / "cache"
    first = packed(folder, cache)
    written = {path: path.stat().st_mtime_ns for path in Path(first.shards).glob("*.tar")}
    notes.clear()
    assert packed(folder, cache) == first
    assert {path: path.stat().st_mtime_ns for path in Path(first.shards).glob("*.tar")} == written
    assert "as packed before in" in notes.text
    (folder / "coat" / "new.png").write_bytes(encoded(picture(99)))
    larger = packed(folder, cache)
    assert len(keys_of(larger)) == 8
    (folder / "coat" / "new.png").unlink()
    assert packed(folder, cache) == first
    # another image of as many bytes, known by the time alone
    same = folder / "boot" / "0.png"
    os.utime(same, ns=(0, same.stat().st_mtime_ns + 1))
    assert packed(folder, cache).shards not in (first.shards, larger.shards)


def test_shards_of_which_a_part_is_gone_are_packed_again(folder: Path, tmp_path: Path) -> None:
    found = packed(folder, tmp_path / "cache")
    next(Path(found.shards).glob("*.tar")).unlink()
    assert packed(folder, tmp_path / "cache") == found
    assert len(keys_of(found)) == 7


def test_one_run_waits_for_another_that_packs_the_same(folder: Path, tmp_path: Path, monkeypatch) -> None:
    first = packed(folder, tmp_path / "cache")
    shutil.rmtree(Path(first.shards).parent)
    waited: list[int] = []
    other = alone_in(Path(first.shards).parent)
    other.__enter__()

    def moved() -> None:
        if not waited:
            other.__exit__(None, None, None)
        waited.append(1)

    monkeypatch.setattr("siglip_train.data.packing.in_cache._POLL_SECONDS", 0.0)
    assert PackIntoCache(str(folder), "mine", str(tmp_path / "cache"), 1, 0.01)(moved) == first
    assert len(waited) == 2


def table(path: Path, columns: list[str], rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_a_table_with_labels_says_its_classes(folder: Path, tmp_path: Path) -> None:
    rows = [("photos/coat/0.png", "coat"), ("photos/boot/0.png", "boot"), ("photos/boot/1.png", "boot")]
    found = packed(table(tmp_path / "mine.csv", ["path", "label"], rows), tmp_path / "cache")
    assert (found.classnames, len(keys_of(found)), found.by) == (["boot", "coat"], 3, None)


def test_several_captions_of_an_image_are_held_out_together(folder: Path, tmp_path: Path) -> None:
    images = [f"photos/coat/{number}.png" for number in range(4)]
    rows = [(image, f"{image} {number}") for number in range(3) for image in images]
    found = packed(table(tmp_path / "mine.csv", ["path", "caption"], rows), tmp_path / "cache")
    keys = keys_of(found)
    assert len(set(keys)) == 12
    assert found.by is not None
    for share in (0.2, 0.5, 0.8):
        part = Selection(held_out=share, by=found.by)
        of_image = {key.rsplit("-", 1)[0]: set() for key in keys}
        for key in keys:
            of_image[key.rsplit("-", 1)[0]].add(key in part)
        assert len(of_image) == 4
        assert all(len(sides) == 1 for sides in of_image.values())


def test_captions_beside_images_are_seen_when_edited(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.png").write_bytes(encoded(picture(ord(name))))
        (folder / f"{name}.txt").write_text(f"an image of {name}")
    first = packed(folder, tmp_path / "cache")
    assert first.classnames == []
    (folder / "a.txt").write_text("another caption")
    assert packed(folder, tmp_path / "cache").shards != first.shards


def test_images_that_cannot_be_used_are_listed_and_too_many_end_the_run(
    folder: Path, tmp_path: Path, notes
) -> None:
    (folder / "coat" / "0.png").write_bytes(b"no image")
    found = packed(folder, tmp_path / "cache")
    assert "source mine: 1 of 7 images cannot be used (1 broken image), listed in" in notes.text
    assert "coat/0" not in keys_of(found)
    with pytest.raises(UserError, match=r"folder: 1 of 7 images cannot be used .*raise data\.max_bad_share"):
        packed(folder, tmp_path / "cache", max_bad_share=0)


def test_mistakes_are_told_in_a_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").touch()
    no_column = table(tmp_path / "no.csv", ["a", "b"], [("x", "y")])
    for place, message in {
        "gone": "there is no .*gone; give a folder of images",
        "empty": "holds neither images",
        "tars": r"holds shards: data\.sources\.mine\.shards=.*tars",
        no_column.name: "has no column .*; siglip-data pack takes options, and data.sources.NAME.shards what",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            packed(tmp_path / place, tmp_path / "cache")
        assert str(raised.value).startswith("data.sources.mine.folder: ")
        assert "\n" not in str(raised.value)


def test_a_disk_without_room_is_told_before(folder: Path, tmp_path: Path, monkeypatch) -> None:
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr("siglip_train.data.packing.in_cache.shutil.disk_usage", lambda _: full)
    with pytest.raises(UserError, match=r"images take \S+ GiB, and .*cache has .*folder by data\.cache_dir"):
        packed(folder, tmp_path / "cache")


def on_a_rank(folder: Path, cache: Path, blind: bool) -> str:
    if blind and os.environ["RANK"] == "1":
        os.chdir(folder)
    try:
        return packed(folder, cache).shards
    except UserError as error:
        return str(error)


@pytest.mark.dist
def test_all_ranks_get_what_rank_0_packs_or_its_error(folder: Path, tmp_path: Path, monkeypatch) -> None:
    first, second = run_ranks(2, on_a_rank, folder, tmp_path / "cache", False)
    assert first == second
    assert len(list(Path(first).glob("*.tar"))) == 1
    first, second = run_ranks(2, on_a_rank, tmp_path / "gone", tmp_path / "cache", False)
    assert first == second
    assert "there is no" in first
    # a cache that each machine has for itself
    monkeypatch.chdir(tmp_path)
    first, second = run_ranks(2, on_a_rank, folder, Path("own"), True)
    assert first == second
    assert "rank 1 does not see" in first
