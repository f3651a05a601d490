"""pack of labelled data: classes of Hugging Face's Parquet, near and remote, of tables and folders; their captions."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_tools.cli import main
from siglip_train.data.folders import benchmark_folder
from siglip_train.data.packing import parquet_tables
from siglip_train.data.packing.labels import caption_of, number_classes
from siglip_train.data.packing.plan import PackOptions, pack
from siglip_train.data.packing.records import SourceOptions
from siglip_train.data.remote.retry import RetryPolicy
from siglip_train.errors import UserError

from .conftest import Sample, read_split
from .hub import Hub, serve
from .hub_rows import picture, write_rows

ANIMALS = ["bird", "cat", "dog"]
TEST = PackOptions(split="test")


def packed(source: Path | str, out: Path, **options: object) -> list[Sample]:
    pack(str(source), out, PackOptions(SourceOptions(**options), split="test"))
    return read_split(out / "test")


def classes(out: Path) -> list[str]:
    return (out / "classnames.txt").read_text().splitlines()


def labels(samples: list[Sample]) -> list[str]:
    return [sample.members.get("cls", b"").decode() for sample in samples]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_class_labels_of_parquet(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    pictures = write_rows(tmp_path / "in.parquet", {"label": [2, 0, 1, -1, 2]}, {"label": ANIMALS}, "img")
    samples = packed(tmp_path / "in.parquet", tmp_path / "out")
    assert "images from column img, labels from column label (3 classes)" in notes.text
    assert [sample.members["png"] for sample in samples] == [*pictures[:3], pictures[4]]
    assert labels(samples) == ["2", "0", "1", "2"]
    assert [sample.facts["class"] for sample in samples] == ["dog", "bird", "cat", "dog"]
    assert not any("txt" in sample.members for sample in samples)
    assert classes(tmp_path / "out") == ANIMALS
    assert "empty caption" in (tmp_path / "out" / "skipped.tsv").read_text()


def test_captions_of_templates(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet", {"label": [0, 1, 2] * 10}, {"label": ANIMALS})
    templates = ["a photo of a {}", "{c}, large"]
    options = PackOptions(SourceOptions(caption_template=templates), validation_share=0.3)
    pack(str(tmp_path / "in.parquet"), tmp_path / "out", options)
    samples = read_split(tmp_path / "out" / "train") + read_split(tmp_path / "out" / "validation")
    texts = {sample.key: sample.members["txt"].decode() for sample in samples}
    by_name = {sample.key: sample.facts["class"] for sample in samples}
    assert len(texts) == 30
    for key, text in texts.items():
        assert text in (f"a photo of a {by_name[key]}", f"{by_name[key]}, large")
    assert 5 < sum(text.endswith("large") for text in texts.values()) < 25
    assert (tmp_path / "out" / "templates.txt").read_text().splitlines() == templates
    # a complete folder is not packed again, and another template is another folder
    assert not pack(str(tmp_path / "in.parquet"), tmp_path / "out", options).is_new
    other = PackOptions(SourceOptions(caption_template=["{}"]), validation_share=0.3)
    with pytest.raises(UserError, match="caption_template"):
        pack(str(tmp_path / "in.parquet"), tmp_path / "out", other)


def test_a_packed_test_split_is_a_set_that_evaluation_knows(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.parquet", {"label": [0, 1, 2]}, {"label": ANIMALS})
    packed(tmp_path / "in.parquet", tmp_path / "out", caption_template=["a {}"])
    folder = benchmark_folder(str(tmp_path / "out"))
    assert folder is not None
    assert [Path(shard).name for shard in folder.shards()] == ["00000.tar"]
    assert (folder.classnames, folder.templates) == (ANIMALS, ["a {}"])


def test_several_columns_of_labels(tmp_path: Path) -> None:
    """As CIFAR-100 has them."""
    names = {"fine_label": ["apple", "bee"], "coarse_label": ["fruit", "insects"]}
    write_rows(tmp_path / "in.parquet", {"fine_label": [1, 0], "coarse_label": [1, 0]}, names, "img")
    with pytest.raises(
        UserError, match="labels in columns fine_label, coarse_label: name one by --label-column"
    ):
        packed(tmp_path / "in.parquet", tmp_path / "out")
    samples = packed(tmp_path / "in.parquet", tmp_path / "out", label_column="Fine_Label")
    assert (labels(samples), classes(tmp_path / "out")) == (["1", "0"], ["apple", "bee"])


def test_captions_go_before_labels_that_are_only_guessed(tmp_path: Path) -> None:
    write(tmp_path / "a.png", picture(0))
    table = write(tmp_path / "in.csv", "image,text,label\na.png,a dog,funny\n")
    (sample,) = packed(table, tmp_path / "out")
    assert "cls" not in sample.members
    assert sample.facts["label"] == "funny"
    assert not (tmp_path / "out" / "classnames.txt").exists()
    (both,) = packed(table, tmp_path / "both", label_column="label")
    assert (both.members["cls"], both.members["txt"]) == (b"0", b"a dog")


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("image,label", ["{},dog", "{},bird", "{},dog"]),
        ("Image;Class Name ;ID", ["{};dog;1", "{};bird;2", "{};dog;3"]),
        ("FILE_NAME\tCategory", ["{}\tdog", "{}\tbird", "{}\tdog"]),
    ],
)
def test_tables_as_people_keep_them(tmp_path: Path, header: str, rows: list[str]) -> None:
    """Semicolons, tabs, capitals, spaces; names of classes are numbered in sorted order."""
    write(tmp_path / "a.png", picture(0))
    table = write(tmp_path / "in.csv", "".join(f"{row.format('a.png')}\n" for row in [header, *rows]))
    given = {"label_column": "class name"} if "Class" in header else {}
    samples = packed(table, tmp_path / "out", **given)
    assert (labels(samples), classes(tmp_path / "out")) == (["1", "0", "1"], ["bird", "dog"])


def test_labels_that_are_none(tmp_path: Path) -> None:
    found = number_classes(
        [1, 3, "2", 7, 1.5, True, None, "", -1, float("nan"), "cat"], ["a", "cat", "b", "c"]
    )
    assert [each if isinstance(each, int) else getattr(each, "cause", None) for each in found.of] == [
        *[1, 3, 2, "bad label", "bad label", "bad label"],
        *[None, None, None, None, 1],
    ]
    assert number_classes(["4", 2, 3.0]).of == [4, 2, 3]
    assert number_classes(["4", "x"]).names == ["4", "x"]
    assert caption_of("key", "a {c} b", ["one {}"]) == "one a {c} b"


def test_keys_of_a_column(tmp_path: Path) -> None:
    write(tmp_path / "a.png", picture(0))
    rows = [{"id": "x.1"}, {"id": 7}, {"id": ""}, {"id": "x_1"}]
    lines = "".join(json.dumps({"image": "a.png", "text": "dog", **row}) + "\n" for row in rows)
    samples = packed(write(tmp_path / "in.jsonl", lines), tmp_path / "out", key_column="id")
    assert [sample.key for sample in samples] == ["x_1", "7"]
    skipped = (tmp_path / "out" / "skipped.tsv").read_text()
    assert "no key" in skipped
    assert "repeated key" in skipped


def test_captions_below_a_star(tmp_path: Path) -> None:
    """As Crossmodal-3600 has them: names of images without an ending, and languages as columns."""
    write(tmp_path / "images" / "0001.jpg", picture(0, "JPEG"))
    row = {"image/key": "0001", "image/locale": "ar",
           "ar": {"caption": ["جمل", "واحد"], "caption/tokenized": [["a"]]},
           "en": {"caption": [" a camel ", "one"], "caption/tokenized": [["b"]]}}  # fmt: skip
    source = write(tmp_path / "captions.jsonl", json.dumps(row) + "\n")
    options = {"image_column": "image/key", "key_column": "image/key", "caption_column": "*.caption"}
    (sample,) = packed(source, tmp_path / "out", image_root=str(tmp_path / "images"), **options)
    assert sample.key == "0001"
    assert sample.members["txt"] == b"a camel"
    assert sample.facts["captions"] == {"ar": ["جمل", "واحد"], "en": ["a camel", "one"]}
    assert sample.facts.keys() == {"image/key", "image/locale", "captions", "language", "width", "height"}


@pytest.mark.parametrize("value", [42, [3, 4], {"en": 5}, True])
def test_numbers_in_place_of_captions_are_named(tmp_path: Path, value: object) -> None:
    write(tmp_path / "a.png", picture(0))
    write(tmp_path / "in" / "b.png", picture(1))
    write(tmp_path / "in" / "b.json", json.dumps({"caption": value}))
    table = write(tmp_path / "in.jsonl", json.dumps({"image": "a.png", "caption": value}) + "\n")
    for source in (table, tmp_path / "in"):
        with pytest.raises(
            UserError, match=r"1 caption is no text.*is this the column, or field, of captions\?"
        ):
            packed(source, tmp_path / "out")


def test_folders_of_classes(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(["dog", "bird", "dog"]):
        write(tmp_path / "in" / name / f"{number}.AVIF".replace("AVIF", "jfif"), picture(number, "JPEG"))
    write(tmp_path / "in" / "dog" / "note.doc", "x")
    samples = packed(tmp_path / "in", tmp_path / "out", caption_template=["the {}"])
    said = notes.text
    assert "the 2 folders are taken for classes (bird, dog)" in said
    assert "files that belong to no image are passed over: .doc 1" in said
    assert [(sample.key, sample.members["cls"], sample.members["txt"]) for sample in samples] == [
        ("bird/1", b"0", b"the bird"), ("dog/0", b"1", b"the dog"), ("dog/2", b"1", b"the dog"),
    ]  # fmt: skip
    assert classes(tmp_path / "out") == ["bird", "dog"]
    # one caption is enough to say that the others are missing
    write(tmp_path / "in" / "dog" / "0.txt", "a dog")
    assert len(packed(tmp_path / "in", tmp_path / "captions")) == 1


def test_folders_of_numbered_classes(tmp_path: Path) -> None:
    for name in ("10", "9"):
        write(tmp_path / "in" / name / "a.png", picture(int(name)))
    assert labels(packed(tmp_path / "in", tmp_path / "out")) == ["10", "9"]
    assert not (tmp_path / "out" / "classnames.txt").exists()
    with pytest.raises(UserError, match="--caption-template needs names of classes"):
        packed(tmp_path / "in", tmp_path / "captions", caption_template=["a {}"])


def test_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write(tmp_path / "in" / split / name / "a.png", picture(0))
    with pytest.raises(UserError, match="holds the splits train, val, not classes: name one of them"):
        packed(tmp_path / "in", tmp_path / "out")
    assert len(packed(tmp_path / "in" / "train", tmp_path / "out")) == 2


def test_captions_of_kohya_and_of_a_table_beside(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "in"
    for name in ("a", "b", "sub/c", "sub/d", "e"):
        write(source / f"{name}.png", picture(ord(name[-1])))
    write(source / "a.caption", "of kohya")
    write(source / "b.txt", "of a text")
    write(source / "b.caption", "not this")
    rows = [{"file_name": "b.png", "text": "not this"}, {"file_name": "e.png", "text": "e", "label": 3},
            {"file_name": "gone.png", "text": "x"}]  # fmt: skip
    write(source / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(source / "sub" / "metadata.csv", "file_name,text\nc.png,one\nc.png,two\n")
    samples = packed(source, tmp_path / "out")
    assert {sample.key: sample.members["txt"].decode() for sample in samples} == {
        "a": "of kohya", "b": "of a text", "e": "e", "sub/c": "one", "sub/c-1": "two",
    }  # fmt: skip
    assert next(sample for sample in samples if sample.key == "e").facts["label"] == 3
    skipped = (tmp_path / "out" / "skipped.tsv").read_text()
    assert "sub/d\tsub/d.png\tempty caption" in skipped
    assert "gone\tgone.png\tmissing file" in skipped
    assert "are passed over: .caption 1\n" in notes.text


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setattr(parquet_tables, "USUAL", RetryPolicy(timeout_seconds=1.0, attempts=4))
    with serve(tmp_path / "hub") as served:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": served.url})
        # for processes that are started
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


def test_parquet_of_the_hub(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture) -> None:
    """By the hub's own client: files are listed by a glob, and no more is read than is needed."""
    folder = tmp_path / "hub" / "uoft-cs" / "cifar10" / "plain_text"
    pictures = []
    for number in range(2):
        name = f"train-0000{number}-of-00002.parquet"
        pictures += write_rows(folder / name, {"label": [2, 0, 1, 2, 1, 0]}, {"label": ANIMALS}, "img")
    write_rows(folder / "test-00000-of-00001.parquet", {"label": [0]}, {"label": ANIMALS}, "img")
    source = "hf://datasets/uoft-cs/cifar10/plain_text/train-*.parquet"
    hub.refuse(2)
    main(["pack", source, str(tmp_path / "out"), "--split", "test", "--caption-template", "a {}"])
    assert "train-*.parquet: images from column img, labels from column label" in capsys.readouterr().err
    samples = read_split(tmp_path / "out" / "test")
    assert [sample.members["png"] for sample in samples] == pictures
    assert labels(samples) == ["2", "0", "1", "2", "1", "0"] * 2
    assert samples[0].members["txt"] == b"a dog"
    assert classes(tmp_path / "out") == ANIMALS
    assert all("bytes=" in read and "train-" in read for read in hub.asked), (
        "parts of the files that were meant"
    )


def test_a_hub_that_goes_away_ends_the_run_and_skips_nothing(tmp_path: Path, hub: Hub, capsys) -> None:
    folder = tmp_path / "hub" / "o" / "d"
    pictures = write_rows(folder / "a.parquet", {"label": [0, 1] * 6}, {"label": ANIMALS})
    command = ["pack", "hf://datasets/o/d/a.parquet", str(tmp_path / "out"), "--split", "test",
               "--shard-samples", "5", "--workers", "1"]  # fmt: skip
    read = parquet_tables._read_remote
    count = 0

    def breaking(path: str, wanted: object) -> object:
        nonlocal count
        count += 1
        if 3 < count < 20:
            raise OSError("cannot read a.parquet: the line is down")
        return read(path, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_tables, "_read_remote", breaking)
        with pytest.raises(SystemExit):
            main(command)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said
        == "error: cannot read a.parquet: the line is down; the same command goes on from here once that is mended"
    )
    assert not (tmp_path / "out" / "skipped.tsv").exists()
    parquet_tables._column.cache_clear()
    main(command)
    assert [sample.members["png"] for sample in read_split(tmp_path / "out" / "test")] == pictures


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://datasets/o/d/*.parquet", "no shard matches"),
        ("hf://datasets/o/gone/a.parquet", "cannot read hf://datasets/o/gone/a.parquet"),
        ("nonsense://o/a.parquet", "Protocol not known: nonsense"),
    ],
)
def test_remote_mistakes(tmp_path: Path, hub: Hub, source: str, message: str, capsys) -> None:
    (tmp_path / "hub" / "o" / "d").mkdir(parents=True)
    with pytest.raises(SystemExit) as leaving:
        main(["pack", source, str(tmp_path / "out")])
    assert leaving.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "kind"}, "has no column kind; its columns are image, other"),
        ({"key_column": "id", "caption_column": "other"}, "has no column id"),
        ({}, "name one by --caption-column, or one of labels by --label-column"),
        ({"label_column": "other", "caption_template": ["a photo"]}, "has no place for the class name"),
    ],
)
def test_mistakes_with_columns(tmp_path: Path, options: dict, message: str) -> None:
    write(tmp_path / "a.png", picture(0))
    table = write(tmp_path / "in.csv", "image,other\na.png,x\n")
    with pytest.raises(UserError, match=message):
        packed(table, tmp_path / "out", **options)
    assert not os.path.exists(tmp_path / "out")
