"""pack: every kind of source, read back with tarfile and Pillow; resizing, splits, faults, resuming, mistakes."""

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_tools.cli import main
from siglip_train.data.packing import parquet_tables, plan, shards
from siglip_train.data.packing.coco_masks import run_lengths
from siglip_train.data.packing.images import ImageOptions
from siglip_train.data.packing.plan import PackOptions, pack
from siglip_train.data.packing.records import SourceOptions
from siglip_train.data.packing.run_record import alone_in
from siglip_train.errors import UserError

from .conftest import Sample, read_split

NO_SPLIT = PackOptions(validation_share=0)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def write(path: Path, content: str | bytes | dict | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict | list):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def packed(
    source: Path, out: Path, options: PackOptions = NO_SPLIT, split: str = "train"
) -> dict[str, Sample]:
    """The samples of a split by key."""
    pack(str(source), out, options)
    return {sample.key: sample for sample in read_split(out / split)}


def causes(out: Path) -> dict[str, str]:
    """Key -> cause of skipped.tsv."""
    with (out / "skipped.tsv").open(newline="") as file:
        return {row["key"]: row["cause"] for row in csv.DictReader(file, delimiter="\t")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty images with captions."""
    for number in range(30):
        write(tmp_path / "photos" / f"{number:03d}.png", encoded(picture(seed=number)))
        write(tmp_path / "photos" / f"{number:03d}.txt", f"noise {number}\n")
    return tmp_path / "photos"


def test_a_folder_keeps_everything_that_lies_beside_a_picture(tmp_path: Path) -> None:
    source = tmp_path / "in"
    jpg, webp = encoded(picture(), "JPEG"), encoded(picture(20, 10), "WEBP")
    mask = encoded(Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40)))
    facts = {"language": "de", "objects": [{"label": "x", "box": [0, 0.25, 0.5, 1]}], "width": 1, "note": "é"}
    write(source / "b" / "one.two.jpg", jpg)
    write(source / "b" / "one.two.txt", "\ufeff Bär\n")
    write(source / "b" / "one.two.json", facts)
    write(source / "b" / "one.two.mask.png", mask)
    write(source / "a.webp", webp)
    write(source / "a.json", {"captions": {"en": "a bear", "fr": "un ours"}, "language": "fr"})
    write(source / "labelled.jpg", jpg)
    write(source / "labelled.cls", "3")
    write(source / ".hidden.jpg", jpg)
    samples = packed(source, tmp_path / "out")
    assert list(samples) == ["a", "labelled", "b/one_two"]
    whole = samples["b/one_two"]
    assert list(whole.members) == ["jpg", "txt", "json", "mask.png"]
    assert (whole.members["jpg"], whole.members["mask.png"]) == (jpg, mask)
    assert whole.members["txt"].decode() == "Bär"
    assert whole.facts == {**facts, "width": 40, "height": 30}
    assert samples["a"].members["txt"] == b"un ours"
    assert samples["a"].members["webp"] == webp
    assert samples["a"].facts["captions"] == {"en": "a bear", "fr": "un ours"}
    assert samples["labelled"].members.keys() == {"jpg", "json", "cls"}
    by_json = PackOptions(SourceOptions(caption_column="note"), validation_share=0)
    assert packed(source, tmp_path / "other", by_json)["b/one_two"].members["txt"].decode() == "é"


def test_bytes_do_not_depend_on_workers(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = [
        str(photos),
        "--shard-samples",
        "7",
        "--validation-share",
        "0.3",
        "--resize",
        "20",
        "--format",
        "jpg",
    ]
    main(["pack", *common, str(tmp_path / "one"), "--workers", "1"])
    main(["pack", *common, str(tmp_path / "two"), "--workers", "2"])
    one = digests(tmp_path / "one")
    assert one == digests(tmp_path / "two")
    assert len(one) > 5
    assert {name.split("/")[0] for name in one} == {"train", "validation", "pack.json", "skipped.tsv"}
    with tarfile.open(tmp_path / "one" / "train" / "00000.tar") as archive:
        assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in archive} == {(0, 0, 0, "")}
    assert "nothing skipped" in capsys.readouterr().out.splitlines()[-1]


def test_an_interrupted_run_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PackOptions(shard_samples=5, validation_share=0.2)
    write(photos / "003.png", b"rubbish")
    pack(str(photos), tmp_path / "whole", options)
    written = []

    def interrupted(task):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(task.path)
        return real(task)

    real = plan.write_shard
    monkeypatch.setattr(plan, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(str(photos), tmp_path / "out", options)
    stamps = [path.stat().st_mtime_ns for path in written]
    monkeypatch.setattr(plan, "write_shard", real)
    pack(str(photos), tmp_path / "out", options)
    assert [path.stat().st_mtime_ns for path in written] == stamps
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert causes(tmp_path / "out") == {"003": "broken image"}


def test_two_runs_never_write_one_file(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with (
        alone_in(out),
        pytest.raises(UserError, match=f"out is being written by process {os.getpid()}: wait"),
    ):
        pack(str(photos), out, NO_SPLIT)
    real, present = shards.add_member, []

    def added(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        present.append({path.name for path in (out / "train").iterdir()})
        real(archive, name, content)

    def interrupted(task: shards.ShardTask) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "add_member", added)
    monkeypatch.setattr(plan, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(str(photos), out, NO_SPLIT)
    # of a process that was killed: its number is part of the name
    ours = f".00000.tar.{os.getpid()}"
    for folder in (out, out / "train", out / ".pack"):
        write(folder / ".00000.tar.4194305", b"half a shard")
    monkeypatch.setattr(plan, "write_shard", shards.write_shard)
    pack(str(photos), out, NO_SPLIT)
    assert present == [{ours}] * 90
    assert set(digests(out)) == {"train/00000.tar", "pack.json", "skipped.tsv"}


def test_run_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = pack(str(photos), out, NO_SPLIT)
    before = digests(out)
    again = pack(str(photos), out, NO_SPLIT)
    assert (again.samples, again.shards, again.skipped) == (first.samples, first.shards, first.skipped)
    assert (first.is_new, again.is_new) == (True, False)
    with pytest.raises(UserError, match=r"resize None, now 8.*another folder"):
        pack(str(photos), out, PackOptions(images=ImageOptions(resize=8), validation_share=0))
    write(photos / "000.txt", "another caption")
    with pytest.raises(UserError, match="source_fingerprint"):
        pack(str(photos), out, NO_SPLIT)
    assert digests(out) == before
    with pytest.raises(UserError, match="not made by pack"):
        pack(str(photos), photos, NO_SPLIT)


@pytest.mark.parametrize("form", ["folder", "table", "coco"])
def test_a_replaced_picture_is_noticed(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    coco = instances(folder, [shape([[0, 0, 3, 0, 3, 3]])])
    table = write(folder / "rows.csv", "image,text\na.png,x\nb.png,y\ngone.png,z\n")
    write(folder / "a.txt", "x")
    source = {"folder": folder, "table": table, "coco": coco}[form]
    pack(str(source), tmp_path / "out", NO_SPLIT)
    write(folder / "a.png", encoded(picture(9, 9)))
    with pytest.raises(UserError, match="source_fingerprint"):
        pack(str(source), tmp_path / "out", NO_SPLIT)


def test_endings_may_be_in_capitals(tmp_path: Path) -> None:
    mask = encoded(Image.new("L", (40, 30)))
    for extension, content in (("PNG", encoded(picture())), ("TXT", b"loud"), ("Mask.PNG", mask)):
        write(tmp_path / "in" / f"A.{extension}", content)
    (sample,) = packed(tmp_path / "in", tmp_path / "out").values()
    assert (sample.key, sample.members["txt"], sample.members["mask.png"]) == ("A", b"loud", mask)


def test_resizing_shrinks_pictures_and_masks_together(tmp_path: Path) -> None:
    source, image = tmp_path / "in", picture(91, 60)
    classes = np.random.default_rng(1).integers(0, 256, (60, 91), dtype=np.uint8)
    small = encoded(picture(19, 50))
    write(source / "large.png", encoded(image))
    write(source / "large.mask.png", encoded(Image.fromarray(classes)))
    write(source / "large.json", {"caption": "noise", "objects": [{"label": "x", "box": [0, 0, 0.5, 1]}]})
    write(source / "small.png", small)
    write(source / "small.txt", "less noise")
    samples = packed(source, tmp_path / "out", PackOptions(images=ImageOptions(20), validation_share=0))
    large = samples["large"]
    assert np.array_equal(opened(large.members["png"]), image.resize((30, 20), Image.Resampling.BICUBIC))
    nearest = opened(large.members["mask.png"])
    assert np.array_equal(nearest, Image.fromarray(classes).resize((30, 20), Image.Resampling.NEAREST))
    assert (large.facts["width"], large.facts["height"]) == (30, 20)
    assert large.facts["objects"] == [{"label": "x", "box": [0, 0, 0.5, 1]}]
    assert samples["small"].members["png"] == small, "images are never enlarged"


@pytest.mark.parametrize(("form", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_encoding_anew(photos: Path, tmp_path: Path, form: str, kind: str) -> None:
    options = PackOptions(images=ImageOptions(format=form, quality=30), validation_share=0)
    for key, sample in packed(photos, tmp_path / "out", options).items():
        image = opened(sample.members[form])
        assert image.format == kind
        expected = io.BytesIO()
        Image.open(photos / f"{key}.png").save(expected, kind, **({} if form == "png" else {"quality": 30}))
        assert np.array_equal(image, opened(expected.getvalue()))


def test_what_is_encoded_anew_has_no_metadata(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tagged = io.BytesIO()
    picture().save(tagged, "PNG", icc_profile=profile, dpi=(300, 300))
    write(tmp_path / "in" / "a.png", tagged.getvalue())
    write(tmp_path / "in" / "a.txt", "noise")
    for form in ("jpg", "png", "webp"):
        options = PackOptions(images=ImageOptions(format=form), validation_share=0)
        image = opened(packed(tmp_path / "in", tmp_path / form, options)["a"].members[form])
        assert not image.info.keys() & {"icc_profile", "dpi", "exif", "comment"}


def test_the_content_decides_the_extension(tmp_path: Path) -> None:
    source, image = tmp_path / "in", picture()
    write(source / "wrong.jpg", encoded(image, "PNG"))
    write(source / "foreign.bmp", encoded(image, "BMP"))
    for name in ("wrong", "foreign"):
        write(source / f"{name}.txt", name)
    for sample in packed(source, tmp_path / "out").values():
        assert np.array_equal(opened(sample.members["png"]), image)


def test_the_split_is_stable_and_keeps_captions_of_a_picture_together(tmp_path: Path) -> None:
    data = encoded(picture())
    for number in range(200):
        write(tmp_path / "images" / f"{number}.png", data)
    rows = [{"path": f"images/{number % 200}.png", "text": f"caption {number}"} for number in range(400)]
    sides = []
    for count in (300, 400):
        table = write(tmp_path / f"{count}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows[:count]))
        result = pack(str(table), tmp_path / f"out{count}", PackOptions(validation_share=0.2))
        assert sum(result.samples.values()) == count
        found = {split: read_split(tmp_path / f"out{count}" / split) for split in ("train", "validation")}
        assert 0.1 < len(found["validation"]) / count < 0.3
        sides.append({sample.key: split for split, samples in found.items() for sample in samples})
        paths = [{sample.facts["path"] for sample in samples} for samples in found.values()]
        assert not paths[0] & paths[1], "an image on both sides"
    assert sides[0].items() <= sides[1].items()


ROWS = [
    {"filepath": "images/a.png", "title": "an a, with a comma", "language": "en", "score": 0.5},
    {"filepath": "images/b.png", "title": 'ein "b"', "language": "de", "score": 2},
]


def tabled(folder: Path, form: str) -> Path:
    path = folder / f"pairs.{form}"
    if form == "jsonl":
        return write(path, "".join(f"{json.dumps(row)}\n\n" for row in ROWS))
    if form == "json":
        return write(path, ROWS)
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        # what is between tabs is not quoted
        form_options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        writer = csv.DictWriter(file, list(ROWS[0]), **(form_options if form == "tsv" else {}))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_tables(tmp_path: Path, form: str, notes: pytest.LogCaptureFixture) -> None:
    table = tabled(tmp_path, form)
    for name in "ab":
        write(tmp_path / "images" / f"{name}.png", encoded(picture(seed=ord(name))))
    samples = list(packed(table, tmp_path / "out").values())
    assert "images from column filepath, captions from column title" in notes.text
    assert [sample.key for sample in samples] == ["000000000", "000000001"]
    for row, sample in zip(ROWS, samples, strict=True):
        assert sample.members["png"] == (tmp_path / row["filepath"]).read_bytes()
        assert sample.members["txt"].decode() == row["title"]
        assert sample.facts["language"] == row["language"]
        assert float(sample.facts["score"]) == row["score"]
        assert "title" not in sample.facts
    named = SourceOptions(str(tmp_path), "filepath", "language")
    other = packed(table, tmp_path / "other", PackOptions(named, validation_share=0))
    assert [sample.members["txt"].decode() for sample in other.values()] == ["en", "de"]


def test_a_quote_mark_swallows_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encoded(picture()))
    captions = ["one", '"Hello he said', "two, three", 'a 12" disc', '"all of it"']
    tabs = "".join(f"a.png\t{caption}\n" for caption in captions)
    samples = packed(write(tmp_path / "pairs.tsv", f"image\ttext\n{tabs}"), tmp_path / "tsv")
    assert [sample.members["txt"].decode() for sample in samples.values()] == captions
    for caption in ('"Hello he said', '"Hello" he said'):
        commas = write(
            tmp_path / "pairs.csv", f'image,text\na.png,"two\nlines"\na.png,{caption}\na.png,"x"\n'
        )
        with pytest.raises(UserError, match=r"pairs\.csv: .*begins in line 4; most often a quote"):
            pack(str(commas), tmp_path / "csv", NO_SPLIT)


def embedded(path: Path, rows: list[dict]) -> Path:
    """A Parquet file of rows with images in it, two rows a group."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_parquet_with_the_pictures_inside(tmp_path: Path) -> None:
    pictures = [encoded(picture(seed=number), "WEBP") for number in range(5)]
    beside = encoded(picture(seed=9))
    write(tmp_path / "beside.png", beside)
    cells: list[dict | None] = [{"bytes": data, "path": f"p/{i}.webp"} for i, data in enumerate(pictures[:3])]
    cells += [{"bytes": None, "path": "beside.png"}, {"bytes": None, "path": None}, None,
              {"bytes": pictures[4][:50], "path": None}, {"bytes": pictures[3], "path": None}]  # fmt: skip
    rows = [{"image": cell, "text": f"number {i}", "score": i} for i, cell in enumerate(cells)]
    source = embedded(tmp_path / "in.parquet", rows)
    samples = packed(source, tmp_path / "out")
    assert list(samples) == ["000000000", "000000001", "000000002", "000000003", "000000007"]
    stored = [sample.members.get("webp") or sample.members["png"] for sample in samples.values()]
    assert stored == [*pictures[:3], beside, pictures[3]]
    assert [sample.members["txt"].decode()[-1] for sample in samples.values()] == ["0", "1", "2", "3", "7"]
    facts = [sample.facts for sample in samples.values()]
    assert [(each.get("image"), each["score"]) for each in facts] == [
        ("p/0.webp", 0), ("p/1.webp", 1), ("p/2.webp", 2), ("beside.png", 3), (None, 7),
    ]  # fmt: skip
    skipped = (tmp_path / "out" / "skipped.tsv").read_text()
    assert [line.split("\t")[2] for line in skipped.splitlines()[1:]] == [
        "no image",
        "no image",
        "broken image",
    ]


def test_parquet_with_plain_bytes(tmp_path: Path) -> None:
    pictures = [encoded(picture(seed=number)) for number in range(7)]
    rows = [{"img": data, "caption": [f"{i}", "more"], "other": b"x"} for i, data in enumerate(pictures)]
    source = embedded(tmp_path / "in.parquet", rows)
    options = PackOptions(shard_samples=2, validation_share=0.3)
    pack(str(source), tmp_path / "one", options, workers=1)
    samples = read_split(tmp_path / "one" / "train") + read_split(tmp_path / "one" / "validation")
    assert sorted(sample.members["png"] for sample in samples) == sorted(pictures)
    for sample in samples:
        assert sample.members["png"] == pictures[int(sample.members["txt"])]
        assert sample.facts.keys() == {"captions", "width", "height"}
    # another image of the same text: the packed folder is of another source
    embedded(source, [*rows[:-1], {**rows[-1], "img": encoded(picture(50, 40))}])
    with pytest.raises(UserError, match="another source"):
        pack(str(source), tmp_path / "one", options)


@pytest.mark.parametrize("form", ["{}", "{}/*.parquet", "{}/p[01].parquet"])
def test_parquet_files_are_one_table(tmp_path: Path, form: str) -> None:
    """As img2dataset writes them: column jpg, in several files, with statistics beside them."""
    pictures = [encoded(picture(seed=number), "JPEG") for number in range(6)]
    folder = tmp_path / "set.parquet"
    write(folder / "p0_stats.json", {"count": 3})
    for file in range(2):
        rows = [{"caption": f"{n}", "jpg": pictures[n]} for n in range(3 * file, 3 * file + 3)]
        embedded(folder / f"p{file}.parquet", rows)
    samples = packed(Path(form.format(folder)), tmp_path / "out")
    assert [sample.members["jpg"] for sample in samples.values()] == pictures
    assert list(samples) == [f"{number:09d}" for number in range(6)]


def test_parquet_beside_pictures_is_not_the_source(photos: Path, tmp_path: Path) -> None:
    write(tmp_path / "in" / "00000.parquet", b"of img2dataset")
    shutil.copytree(photos, tmp_path / "in" / "00000")
    assert len(packed(tmp_path / "in", tmp_path / "out")) == 30


def test_parquet_with_a_dictionary_of_pictures(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    pictures = [encoded(picture(seed=number)) for number in range(2)]
    column = pyarrow.array([pictures[0], pictures[1], pictures[0]]).dictionary_encode()
    table = pyarrow.table({"image": column, "text": ["a", "b", "c"]})
    parquet.write_table(table, tmp_path / "in.parquet")
    samples = packed(tmp_path / "in.parquet", tmp_path / "out")
    assert [sample.members["png"] for sample in samples.values()] == [*pictures, pictures[0]]


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_tables, "parquet", None)
    with pytest.raises(UserError, match=r"siglip-train\[parquet\]"):
        pack(str(write(tmp_path / "x.parquet", b"PAR1")), tmp_path / "out", NO_SPLIT)
    assert not (tmp_path / "out").exists()


def test_coco(tmp_path: Path) -> None:
    images = [
        {"id": 7, "file_name": "0007.png", "width": 40, "height": 30},
        {"id": 9, "file_name": "0009.png", "width": 40, "height": 30},
        {"id": 11, "file_name": "0011.png", "width": 40, "height": 30},
    ]
    captions = [(9, "nine"), (7, "seven"), (9, "also nine ")]
    boxes = [(9, 2, [10, 15, 20, 7.5], 0), (9, 1, [30, 0, 20, 30], 1), (9, 1, [5, 5, 0, 9], 0)]
    said = write(tmp_path / "notes" / "captions.json", {
        "images": images, "annotations": [{"image_id": image, "caption": text} for image, text in captions],
    })  # fmt: skip
    found = write(tmp_path / "notes" / "instances.json", {
        "images": images,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            for image, category, box, crowd in boxes
        ],
    })  # fmt: skip
    for image in images:
        write(tmp_path / "val" / image["file_name"], encoded(picture()))
    source = SourceOptions(image_root=str(tmp_path / "val"), coco_instances=str(found))
    samples = packed(said, tmp_path / "out", PackOptions(source, validation_share=0))
    assert list(samples) == ["0007", "0009"]
    nine = samples["0009"]
    assert nine.members["txt"] == b"nine"
    assert nine.facts["captions"] == ["nine", "also nine"]
    assert nine.facts["objects"] == [
        {"label": "dog", "box": [0.25, 0.5, 0.75, 0.75]},
        {"label": "cat", "box": [0.75, 0.0, 1.0, 1.0], "crowd": True},
    ]
    assert "objects" not in samples["0007"].facts
    assert causes(tmp_path / "out") == {"0011": "empty caption"}
    alone = PackOptions(SourceOptions(image_root=str(tmp_path / "val")), validation_share=0)
    boxed = packed(found, tmp_path / "boxed", alone)
    assert len(boxed) == 3
    assert boxed["0009"].facts["objects"] == nine.facts["objects"]


# as MDETR publishes RefCOCO: an entry of `images` for each expression
REFERRING = {
    "images": [
        {"id": place, "file_name": f"COCO_train2014_00000000000{number}.png", "width": 40, "height": 30,
         "original_id": number, "caption": text, "dataset_name": "refcoco"}
        for place, (number, text) in enumerate([(7, "the cat"), (9, "a dog"), (7, "cat left"), (9, "sky")])
    ],
    "annotations": [
        {"id": place, "image_id": place, "bbox": box, "iscrowd": 0, "category_id": 1, "tokens_positive": [[0, 3]]}
        for place, box in enumerate([[10, 15, 20, 7.5], [30, 0, 20, 30], [0, 0, 4, 3]])
    ],
    "categories": [],
}  # fmt: skip


def test_expressions_of_refcoco_as_json(tmp_path: Path) -> None:
    source = write(tmp_path / "finetune_refcoco_val.json", REFERRING)
    for number in (7, 9):
        write(tmp_path / "train2014" / f"COCO_train2014_00000000000{number}.png", encoded(picture()))
    options = PackOptions(SourceOptions(image_root=str(tmp_path / "train2014")), split="test")
    samples = packed(source, tmp_path / "out", options, split="test")
    assert [samples[f"COCO_train2014_00000000000{number}"].facts["regions"] for number in (7, 9)] == [
        [
            {"box": [0.25, 0.5, 0.75, 0.75], "text": "the cat"},
            {"box": [0.0, 0.0, 0.1, 0.1], "text": "cat left"},
        ],
        [{"box": [0.75, 0.0, 1.0, 1.0], "text": "a dog"}],
    ]
    assert causes(tmp_path / "out") == {"images[3]": "no box of its own"}


def test_expressions_of_refcoco_as_parquet_with_images_shrunk(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"question_id": str(place), "image": {"bytes": encoded(picture(40, 30)), "path": None},
         "question": "Please describe", "answer": texts, "bbox": box, "file_name": name}
        for place, (texts, box, name) in enumerate([
            (["the cat", "cat left"], [10.0, 15.0, 20.0, 7.5], "COCO_train2014_000000000007_1.jpg"),
            (["a dog"], [1.0, 2.0], "COCO_train2014_000000000009_2.jpg"),
        ])
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "val-0.parquet")
    source = SourceOptions(caption_column="answer", key_column="file_name", box_column="bbox")
    options = PackOptions(source, ImageOptions(15), split="test")
    samples = packed(tmp_path / "val-0.parquet", tmp_path / "out", options, split="test")
    (seven,) = samples.values()
    assert seven.key == "COCO_train2014_000000000007_1_jpg"
    assert (seven.facts["width"], seven.facts["height"]) == (20, 15)
    assert seven.facts["regions"] == [
        {"box": [0.25, 0.5, 0.75, 0.75], "text": text} for text in ("the cat", "cat left")
    ]
    assert list(causes(tmp_path / "out").values()) == ["no box"]


def instances(
    folder: Path, annotations: list[dict], size: tuple[int, int] = (8, 6), ids: tuple = (3, 7)
) -> Path:
    """COCO instances, without captions, of the image a.png of 8 x 6 pixels and of b.png, which has no size."""
    write(folder / "a.png", encoded(picture(8, 6)))
    write(folder / "b.png", encoded(picture(8, 6)))
    images = [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]},
              {"id": 2, "file_name": "b.png", "width": 0, "height": 6}]  # fmt: skip
    categories = [{"id": number, "name": f"thing {number}"} for number in ids]
    content = {"images": images, "categories": categories, "annotations": annotations}
    return write(folder / "instances.json", content)


def shape(segmentation: list | dict, category: int = 3, **more: object) -> dict:
    return {"image_id": 1, "category_id": category, "segmentation": segmentation, **more}


# of a rectangle (2, 1) to (5, 4)
RUNS = {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 20]}
DRAWN = np.zeros((6, 8), np.uint8)
DRAWN[1:4, 2:5] = 1


@pytest.mark.parametrize(
    "segmentation",
    [
        [[2, 1, 5, 1, 5, 4, 2, 4]],
        [[2, 1, 4, 1, 4, 4, 2, 4], [3.6, 1.4, 5.4, 1.4, 5.4, 4.4, 3.6, 4.4]],
        RUNS,
        {**RUNS, "counts": "=33000a0"},
    ],
)
def test_coco_masks(tmp_path: Path, segmentation: list | dict) -> None:
    source = instances(tmp_path, [shape(segmentation)])
    sample = packed(source, tmp_path / "out")["a"]
    assert np.array_equal(opened(sample.members["mask.png"]), DRAWN * 3)
    assert sample.facts["classes"] == {"3": "thing 3"}
    pack(str(source), tmp_path / "out", NO_SPLIT)
    instances(tmp_path, [shape([[0, 0, 5, 1, 5, 4]])])
    with pytest.raises(UserError, match="source_fingerprint"):
        pack(str(source), tmp_path / "out", NO_SPLIT)


def test_coco_masks_over_one_another(tmp_path: Path) -> None:
    small, whole = [[2, 1, 5, 1, 5, 4, 2, 4]], [[-9, -9, 99, -9, 99, 99, -9, 99]]
    crowd = {"size": [6, 8], "counts": [0, 6, 42]}
    annotations = [shape(crowd, 7, iscrowd=1), shape(small), shape(whole, 7), shape([[0, 0, 3, 3]])]
    # twice as large as the image that is there: like boxes, masks fit it
    for size, times in ((8, 6), 1), ((16, 12), 2):
        scaled = [shape((np.array(small) * times).tolist()), shape(whole, 7)] if times == 2 else annotations
        sample = packed(instances(tmp_path, scaled, size), tmp_path / str(times))["a"]
        assert np.array_equal(opened(sample.members["mask.png"]), np.where(DRAWN, 3, 7))
    # ids that are no numbers of 8 bits become places in the list
    sample = packed(instances(tmp_path, [shape(small, 900)], ids=(0, 900)), tmp_path / "renumbered")["a"]
    assert np.array_equal(opened(sample.members["mask.png"]), DRAWN * 2)
    assert sample.facts["classes"] == {"2": "thing 900"}


def test_compressed_runs_are_those_of_pycocotools() -> None:
    # the example of its own tests, with numbers of two characters and below zero
    assert run_lengths("61X13mN000`0") == [6, 1, 40, 4, 5, 4, 5, 4, 21]


def test_annotations_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    box = {"category_id": 3, "bbox": [0, 0, 4, 3]}
    wrong = [{**box, "image_id": 99}, {**box, "image_id": 2}, {**box, "image_id": 1, "bbox": [1]}, 5,
             shape([[0, 0, 1, 1, 0, 1]], 8)]  # fmt: skip
    samples = packed(instances(tmp_path, [*wrong, {**box, "image_id": 1}]), tmp_path / "out")
    assert samples["a"].facts["objects"] == [{"label": "thing 3", "box": [0.0, 0.0, 0.5, 0.5]}]
    assert list(samples) == ["a", "b"]
    assert causes(tmp_path / "out") == {
        "annotations[0]": "unknown image",
        "annotations[1]": "no image size",
        "annotations[2]": "broken annotation",
        "annotations[3]": "broken annotation",
        "annotations[4]": "unknown category",
    }
    broken = [
        [[1, 2, 3]],
        {"size": [6, 8], "counts": [3]},
        {"size": [8, 6], "counts": [48]},
        {"size": [6, 8]},
        [None],
    ]
    for place, segmentation in enumerate(broken):
        out = tmp_path / f"broken{place}"
        assert list(packed(instances(tmp_path, [shape(segmentation)]), out)) == ["b"]
        assert causes(out) == {"a": "broken mask"}


def test_shards_are_packed_anew(tiny_dir: Path, tmp_path: Path) -> None:
    originals = {sample.key: sample for sample in read_split(tiny_dir / "classes_seen")}
    samples = packed(
        tiny_dir / "classes_seen", tmp_path / "out", PackOptions(shard_samples=10, validation_share=0)
    )
    assert samples.keys() == originals.keys()
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) == -(-len(samples) // 10)
    for key, sample in samples.items():
        assert sample.facts == originals[key].facts
        members, expected = ({**each.members, "json": b""} for each in (sample, originals[key]))
        assert members == expected


def test_keys_that_two_shards_share_are_told_apart(tiny_dir: Path, tmp_path: Path) -> None:
    shard = sorted((tiny_dir / "validation").glob("*.tar"))[0]
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(shard, source / "x.tar")
    with tarfile.open(shard) as archive:
        images = [member for member in archive if not member.name.endswith((".txt", ".json", ".mask.png"))]
    # in the middle of an image
    end = images[-2].offset_data + images[-2].size // 2
    (source / "y.tar").write_bytes(shard.read_bytes()[:end])
    result = pack(str(source), tmp_path / "out", NO_SPLIT)
    keys = Counter(sample.key.split("/")[0] for sample in read_split(tmp_path / "out" / "train"))
    with tarfile.open(shard) as archive:
        whole = len({name.split(".")[0] for name in archive.getnames()})
    assert keys["y"] + len(keys) - 1 == result.samples["train"]
    assert len(keys) - 1 == whole
    assert 0 < keys["y"] < whole
    assert result.skipped == {"truncated": 1}


def test_what_cannot_be_used_is_skipped_and_listed(tmp_path: Path) -> None:
    source, good = tmp_path / "in", encoded(picture())
    wrong_size = encoded(Image.new("L", (3, 3)))
    jpeg = encoded(picture(), "JPEG")
    broken = {
        "broken image": ({"png": good[:500], "txt": b"x"}),
        "damaged picture data": ({"jpg": jpeg[:-200] + jpeg[-2:], "txt": b"x"}),
        "empty image": ({"png": b"", "txt": b"x"}),
        "empty caption": ({"png": good, "txt": b" \n", "json": b'{"caption": ""}'}),
        "not utf-8": ({"png": good, "txt": b"\xff\xfe\xfa"}),
        "broken json": ({"png": good, "txt": b"x", "json": b"[1]"}),
        "broken mask": ({"png": good, "txt": b"x", "mask.png": b"\x89PNG"}),
        "mask of another size": ({"png": good, "txt": b"x", "mask.png": wrong_size}),
        "repeated key": ({"webp": encoded(picture(), "WEBP")}),
    }
    for cause, members in broken.items():
        for extension, data in members.items():
            write(source / f"{cause if cause != 'repeated key' else 'good'}.{extension}", data)
    write(source / "good.png", good)
    write(source / "good.txt", "fine")
    assert list(packed(source, tmp_path / "out")) == ["good"]
    expected = {cause if cause != "repeated key" else "good": cause for cause in broken}
    assert causes(tmp_path / "out") == expected
    record = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert record["skipped"] == dict.fromkeys(broken, 1)


def test_a_pack_of_nothing_is_not_in_the_way(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write(source / "a.png", encoded(picture()))
    write(source / "a.json", {"words": "noise"})
    with pytest.raises(UserError, match=r"nothing could be packed: skipped 1 \(1 empty caption\)"):
        pack(str(source), out, NO_SPLIT)
    assert not list(out.iterdir())
    named = PackOptions(SourceOptions(caption_column="words"), validation_share=0)
    assert packed(source, out, named)["a"].members["txt"] == b"noise"


def test_bad_rows_are_skipped_and_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encoded(picture()))
    lines = [{"image": "a.png", "caption": ["", "one", "two"]}, {"image": "gone.png", "caption": "x"},
             {"image": 3, "caption": "x"}, {"image": "a.png", "caption": None}]  # fmt: skip
    text = "\n".join(map(json.dumps, lines)) + "\n{not json\n"
    samples = packed(write(tmp_path / "rows.jsonl", text), tmp_path / "out")
    assert samples["000000000"].members["txt"] == b"one"
    assert samples["000000000"].facts["captions"] == ["one", "two"]
    assert list(causes(tmp_path / "out").values()) == [
        "missing file",
        "no image",
        "empty caption",
        "broken json",
    ]


def test_rows_of_json_need_not_be_alike(tmp_path: Path, notes: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.png", encoded(picture()))
    rows = [{"image": "a.png", "source": "web"}, {"image": "a.png", "caption": "one", "text": "more"},
            {"path": "a.png", "text": "two"}]  # fmt: skip
    deep = {"image": "a.png", "caption": "x", "more": json.loads("[" * 500 + "]" * 500)}
    source = write(tmp_path / "rows.json", [*rows, "no object", deep])
    samples = packed(source, tmp_path / "out")
    assert "images from column image or path, captions from column caption or text" in notes.text
    assert {key: sample.members["txt"] for key, sample in samples.items()} == {
        "000000001": b"one", "000000002": b"two",
    }  # fmt: skip
    assert samples["000000001"].facts["text"] == "more"
    assert causes(tmp_path / "out") == {
        "000000000": "empty caption",
        "000000003": "broken json",
        "000000004": "broken json",
    }
    listed = (tmp_path / "out" / "skipped.tsv").read_text()
    assert "nested deeper than 64 levels" in listed


def test_json_has_no_numbers_that_others_refuse(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encoded(picture()))
    line = '{"image": "a.png", "text": "x", "score": NaN, "more": {"list": [1.5, -Infinity, 1e999]}}\n'
    facts = packed(write(tmp_path / "rows.jsonl", line), tmp_path / "out")["000000000"].facts
    assert (facts["score"], facts["more"]) == (None, {"list": [1.5, None, None]})


def test_no_warning_of_pictures_that_are_allowed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert len(packed(photos, tmp_path / "out")) == 30
    assert not [each for each in recwarn if issubclass(each.category, Image.DecompressionBombWarning)]


def test_webdataset_reads_what_is_packed(photos: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    shutil.copytree(photos, tmp_path / "in" / "ä.folder" / ("long" * 40))
    pack(str(tmp_path / "in"), tmp_path / "out", NO_SPLIT)
    theirs = list(webdataset.WebDataset(str(tmp_path / "out" / "train" / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [f"ä.folder/{'long' * 40}/{n:03d}" for n in range(30)]
    assert [sample["png"] for sample in theirs] == [
        path.read_bytes() for path in sorted(photos.glob("*.png"))
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "no shard matches"),
        (["{tmp}/empty"], "neither images"),
        (["{tmp}/photos", "--image-root", "x"], "--image-root means nothing for a folder"),
        (["{tmp}/photos", "--quality", "101"], "1 to 100"),
        (["{tmp}/photos", "--validation-share", "2"], "share"),
        (["{tmp}/t.csv"], "--image-root where they are"),
        (["{tmp}/t.csv", "--caption-column", "words"], "no column words; its columns are image, text"),
        (["{tmp}/urls.csv"], "img2dataset"),
        (["{tmp}/quote.csv"], "unexpected end of data, in the row that begins in line 1"),
        (["{tmp}/words.csv"], "no column of images, one called image, image_path"),
        (["{tmp}/t.json"], "neither a list of objects nor COCO's"),
        (["{tmp}/refs(unc).p"], "is a pickle, which can run any code"),
        (["{tmp}/t.csv", "--box-column", "bbox"], "no column bbox; its columns are image, text"),
        (["{tmp}/coco.json"], "KeyError 'file_name'"),
        (["{tmp}/deep.json"], "deep.json: maximum recursion depth"),
        (["{tmp}/photos/1.txt"], "no tar file"),
        (
            ["{tmp}/uncaptioned"],
            "nothing could be packed: skipped 1 (1 empty caption), the first being 1.png",
        ),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "photos" / "1.png", encoded(picture()))
    write(tmp_path / "photos" / "1.txt", "noise")
    write(tmp_path / "uncaptioned" / "1.png", encoded(picture()))
    write(tmp_path / "t.csv", "image,text\nnot/there.png,a\n")
    write(tmp_path / "urls.csv", "image,text\nhttps://example.org/a.png,a\n")
    write(tmp_path / "quote.csv", '"image,text\na.png,a\n')
    write(tmp_path / "words.csv", "picture,text\na.png,a\n")
    write(tmp_path / "refs(unc).p", b"")
    write(tmp_path / "t.json", {"images": 3})
    write(tmp_path / "coco.json", {"images": [{"id": 1}], "annotations": []})
    write(tmp_path / "deep.json", "[" * 200_000)
    (tmp_path / "empty").mkdir()
    source, *options = (argument.format(tmp=tmp_path) for argument in arguments)
    with pytest.raises(SystemExit) as leaving:
        main(["pack", source, str(tmp_path / "out"), *options, "--workers", "1"])
    assert leaving.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]


def test_help_shows_an_example(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["pack", "--help"])
    assert leaving.value.code == 0
    assert "siglip-data pack photos data/photos" in capsys.readouterr().out
