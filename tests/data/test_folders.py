"""Folders as evaluation sets: the order of shards and labels, what the folder says, and what it is not."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siglip_train.data.folders import benchmark_folder, class_folder_names
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.shards.select import Selection
from siglip_train.errors import UserError
from siglip_train.evals.loader import EvaluationSource, build_evaluation_loader, check_found
from tests.data.conftest import encoded, picture
from tests.data.shard_files import sample, write_tar

TRANSFORM = ImageTransform(16, 8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("siglip_train.data.remote.locations.default_cache", lambda: tmp_path / "cache")


def rows(source: EvaluationSource, **options: int) -> list[tuple[str, tuple[int, ...] | None, str]]:
    """(key, labels, group) of every sample."""
    loader = build_evaluation_loader(source, TRANSFORM, **{"batch_size": 4, **options})
    return [
        (batch.keys[row], batch.labels[row] if batch.labels else None, batch.groups[row])
        for batch in loader
        for row, place in enumerate(batch.index.tolist())
        if place >= 0
    ]


def benchmark_set(root: Path, shards: int = 12) -> Path:
    """A set of a sample a shard, labelled by its shard."""
    for number in range(shards):
        write_tar(root / "test" / f"{number}.tar", sample(f"s{number:04d}", number, cls=str(number).encode()))
    (root / "test" / "nshards.txt").write_text(f"{shards}\n")
    (root / "classnames.txt").write_text("".join(f"class {number} \n" for number in range(shards)))
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}.\n")
    return root


@pytest.mark.parametrize("named", ["", "test"])
def test_shards_of_the_benchmark_layout_come_in_the_order_of_their_numbers(tmp_path: Path, named: str):
    root = benchmark_set(tmp_path / "set")
    expected = [(f"{number}.tar/s{number:04d}", (number,), "") for number in range(12)]
    assert rows(EvaluationSource(str(root / named), label="cls")) == expected
    folder = benchmark_folder(str(root / named))
    assert folder is not None
    assert folder.classnames == [f"class {number}" for number in range(12)]
    assert folder.templates == ["a {c}", "the {c}."]
    assert folder.type == "classification"


def test_a_benchmark_layout_without_its_count_is_recognised_by_its_shards(tmp_path: Path):
    root = benchmark_set(tmp_path / "set")
    (root / "test" / "nshards.txt").unlink()
    assert [labels for _, labels, _ in rows(EvaluationSource(str(root), label="cls"))] == [
        (number,) for number in range(12)
    ]


@pytest.mark.parametrize(("count", "message"), [("many", "nshards.txt holds 'many'"), ("13", "12.tar")])
def test_a_wrong_count_of_shards_is_an_error(tmp_path: Path, count: str, message: str):
    root = benchmark_set(tmp_path / "set")
    (root / "test" / "nshards.txt").write_text(count)
    with pytest.raises(UserError, match=message):
        rows(EvaluationSource(str(root)))


def pictures(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(number)))
    return root


def test_folders_of_classes_are_labelled_in_sorted_order(tmp_path: Path):
    root = pictures(
        tmp_path / "val", ["owl/b.PNG", "cat/x.y.png", "cat/deep/a.png", "owl/a.png", ".hidden/a.png"]
    )
    (root / "cat" / "notes.txt").write_text("no image")
    expected = [
        ("val/cat/deep/a", (0,), ""), ("val/cat/x.y", (0,), ""), ("val/owl/a", (1,), ""), ("val/owl/b", (1,), ""),
    ]  # fmt: skip
    assert rows(EvaluationSource(str(root), label="cls")) == expected
    halves = [rows(EvaluationSource(str(root), label="cls"), rank=rank, world_size=2) for rank in range(2)]
    assert halves == [expected[:2], expected[2:]]
    chosen = EvaluationSource(str(root), label="cls", select=Selection(keys="^owl/"))
    assert rows(chosen) == expected[2:]
    loader = build_evaluation_loader(EvaluationSource(str(root)), TRANSFORM, batch_size=4, workers=1)
    np.testing.assert_array_equal(np.asarray(loader.original(3)), np.asarray(picture(0)))
    assert len(list(loader)) == 1


def test_folders_with_numbers_for_names_are_the_labels_not_their_order_as_text(tmp_path: Path):
    root = pictures(tmp_path / "v2", ["10/a.png", "2/a.png", "0/a.png"])
    assert [labels for _, labels, _ in rows(EvaluationSource(str(root), label="cls"))] == [(0,), (2,), (10,)]
    assert class_folder_names(str(root)) == {0: "0", 2: "2", 10: "10"}


def test_a_broken_picture_in_a_folder_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = pictures(tmp_path / "val", ["cat/a.png", "owl/b.png"])
    (root / "cat" / "a.png").write_bytes(b"no image")
    loader = build_evaluation_loader(EvaluationSource(str(root), label="cls"), TRANSFORM, batch_size=4)
    list(loader)
    assert loader.counts == {"seen": 2, "bad/broken image": 1}
    assert "bad sample val/cat/a: broken image" in caplog.text


def test_no_picture_of_a_folder_is_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Whatever Pillow reads is read, what it does not read is a broken one, and other files are named."""
    Image.init()
    kinds = {"gif": "GIF", "TIF": "TIFF", "jfif": "JPEG", "jp2": "JPEG2000", "Avif": "AVIF"}
    for ending, kind in kinds.items():
        path = tmp_path / "val" / "cat" / f"{ending}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # AVIF and JPEG 2000 are not in every build of Pillow
        if kind in Image.SAVE:
            picture(0).save(path, kind)
    (tmp_path / "val" / "cat" / "raw.cr2").write_bytes(b"raw")
    (tmp_path / "val" / "cat" / "later.heic").write_bytes(b"\0\0\0\x18ftypheic")
    written = len(list((tmp_path / "val" / "cat").iterdir())) - 2
    loader = build_evaluation_loader(
        EvaluationSource(str(tmp_path / "val"), label="cls"), TRANSFORM, batch_size=9
    )
    (batch,) = loader
    assert int((batch.index >= 0).sum()) == written >= 3
    assert loader.counts["bad/broken image"] == 1
    assert loader.counts["excluded/no image by its ending"] == 1
    assert "val/cat/raw.cr2: no image by its ending" in caplog.text


@pytest.mark.parametrize("names", [("train", "val"), ("Test",), ("train", "test", "validation")])
def test_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...]):
    root = pictures(tmp_path / "set", [f"{name}/{kind}/a.png" for name in names for kind in ("cat", "owl")])
    for look in (check_found, lambda source: rows(source)):
        with pytest.raises(UserError, match=f"holds the splits {', '.join(sorted(names))}, not classes"):
            look(EvaluationSource(str(root), label="cls"))
    assert len(rows(EvaluationSource(str(root / names[0]), label="cls"))) == 2
    # a train is a class among others
    pictures(root, ["car/a.png"])
    assert class_folder_names(str(root)) == dict(enumerate(sorted([*names, "car"])))


def test_text_files_about_a_set(tmp_path: Path):
    """Windows writes a mark in front, and old programs other encodings."""
    root = benchmark_set(tmp_path / "set")
    (root / "classnames.txt").write_bytes("\ufeffcat\nö\n".encode())
    folder = benchmark_folder(str(root))
    assert folder is not None
    assert folder.classnames == ["cat", "ö"]
    (root / "classnames.txt").write_bytes("cat\nfée\n".encode("latin-1"))
    with pytest.raises(
        UserError, match=r"classnames.txt is not UTF-8 \(line 2, byte 0xe9\): save it as UTF-8"
    ):
        _ = folder.classnames


def test_a_folder_of_classes_has_no_captions(tmp_path: Path):
    root = pictures(tmp_path / "val", ["cat/a.png"])
    with pytest.raises(UserError, match="neither captions nor groups"):
        rows(EvaluationSource(str(root), text="txt"))


def test_neither_a_folder_of_shards_nor_an_empty_one_is_a_folder_of_classes(tmp_path: Path):
    benchmark_set(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    for shards in (tmp_path / "set", tmp_path / "set" / "test", tmp_path / "empty", tmp_path / "none"):
        assert class_folder_names(str(shards)) == {}
    with pytest.raises(UserError, match="no shard in folder"):
        rows(EvaluationSource(str(tmp_path / "empty")))


def test_several_labels_groups_a_border_and_a_center(tmp_path: Path):
    vector = io.BytesIO()
    np.save(vector, np.array([0, 1, 0, 1]))
    members = [
        *sample("a", 0, json=b'{"real": [3, "1"], "region": "Asia"}', npy=vector.getvalue()),
        *sample("b", 1, json=b'{"real": [], "region": 7}', npy=b"x"),
        *sample("c", 2, json=b'{"region": "Europe"}', npy=vector.getvalue()),
    ]
    path = str(write_tar(tmp_path / "a.tar", members))
    source = EvaluationSource(path, label="json:real", group="json:region")
    # an empty list is an answer, a missing one is not
    assert rows(source) == [("a.tar/a", (3, 1), "Asia"), ("a.tar/b", (), "7")]
    assert [labels for _, labels, _ in rows(EvaluationSource(path, label="npy"))] == [(1, 3), (1, 3)]
    (batch,) = build_evaluation_loader(EvaluationSource(path, border=1), TRANSFORM, batch_size=3)
    width, height = picture(0).size
    expected = TRANSFORM(picture(0).crop((1, 1, width - 1, height - 1)))
    np.testing.assert_array_equal(batch.images.patches[0].numpy(), expected)
    (batch,) = build_evaluation_loader(EvaluationSource(path, center=0.5), TRANSFORM, batch_size=3)
    np.testing.assert_array_equal(batch.images.patches[0].numpy(), TRANSFORM(picture(0), 0.5))
    loader = build_evaluation_loader(EvaluationSource(path, border=500), TRANSFORM, batch_size=3)
    list(loader)
    assert loader.counts["bad/picture too small"] == 3
