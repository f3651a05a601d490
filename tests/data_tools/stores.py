"""Stand-ins of the stores that recipes get data from: what `wget`, `hf download`, … leave, small, in the same form."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .hub_rows import picture, write_rows

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def _put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _img2dataset(folder: Path, **columns: str) -> None:
    """Two shards as img2dataset 1.47 writes them: keys of nine digits, a Parquet file and statistics beside each."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for shard in range(2):
        rows, members = [], {}
        for number in range(6):
            key = f"{shard:05d}{number:04d}"
            is_there = number != 2
            facts = {
                **columns, "caption": f"a photograph of thing {number}", "url": f"http://x/{key}.jpg", "key": key,
                "status": "success" if is_there else "failed_to_download",
                "error_message": None if is_there else "HTTP Error 404: Not Found",
                "width": 90 if is_there else None, "height": 80 if is_there else None,
                "original_width": 96, "original_height": 80, "exif": "{}", "sha256": "0" * 64,
            }  # fmt: skip
            rows.append(facts)
            if is_there:
                members[f"{key}.jpg"] = picture(10 * shard + number, "JPEG", (90, 80))
                members[f"{key}.json"] = json.dumps(facts, indent=4).encode()
                members[f"{key}.txt"] = facts["caption"].encode()
        _tar(folder / f"{shard:05d}.tar", members)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        _put(folder / f"{shard:05d}_stats.json", json.dumps({"count": 6, "successes": 5}, indent=4))


def cc3m(place: Path, hub: Path) -> None:
    _put(place / "Train_GCC-training.tsv", "a very typical bus station\thttp://x/1.jpg\n")
    _img2dataset(place / "data" / "cc3m")


def cc12m(place: Path, hub: Path) -> None:
    _put(
        place / "urls.tsv",
        "http://x/1.jpg\tMetal Design Within Reach Ivory Slipper Chairs - a Pair For Sale\n",
    )
    _img2dataset(place / "data" / "cc12m")


def datacomp(place: Path, hub: Path) -> None:
    _img2dataset(place / "data" / "datacomp", uid="0" * 32)


def coco(place: Path, hub: Path) -> None:
    with zipfile.ZipFile(_made(place / "coco" / "annotations_trainval2017.zip"), "w") as notes:
        for split, first in (("train2017", 9), ("val2017", 139)):
            images = [
                {"license": 4, "file_name": f"{number:012d}.jpg", "height": 20, "width": 24, "id": number}
                for number in range(first, first + 4)
            ]
            captions = [
                {
                    "image_id": image["id"],
                    "id": 10 * image["id"] + n,
                    "caption": f"Caption {n} of {image['id']}.",
                }
                for image in images
                for n in range(5)
            ]
            box = {"segmentation": [[2.0, 2, 9, 2, 9, 9]], "area": 24.5, "iscrowd": 0, "bbox": [2, 2, 7, 7]}
            objects = [
                {**box, "image_id": image["id"], "category_id": 18, "id": image["id"]} for image in images
            ]
            info = {"info": {"year": 2017}, "licenses": [], "images": images}
            notes.writestr(
                f"annotations/captions_{split}.json", json.dumps({**info, "annotations": captions})
            )
            kinds = [{"supercategory": "animal", "id": 18, "name": "dog"}]
            found = {**info, "annotations": objects, "categories": kinds}
            notes.writestr(f"annotations/instances_{split}.json", json.dumps(found))
            with zipfile.ZipFile(place / "coco" / f"{split}.zip", "w") as archive:
                for image in images:
                    archive.writestr(f"{split}/{image['file_name']}", picture(image["id"], "JPEG"))


def coco_karpathy(place: Path, hub: Path) -> None:
    root = place / "data" / "coco_karpathy"
    members = {}
    for number in range(4):
        members[f"s{number:07d}.jpg"] = picture(number, "JPEG")
        members[f"s{number:07d}.txt"] = "\n".join(f"Caption {n} of {number}." for n in range(5)).encode()
    _tar(root / "test" / "0.tar", members)
    _put(root / "test" / "nshards.txt", "1\n")
    _put(root / "dataset_type.txt", "retrieval\n")


def imagenet(place: Path, hub: Path) -> None:
    names = [f"name {number}, synonym" for number in range(1000)]
    folder = hub / "ILSVRC" / "imagenet-1k" / "data"
    for number in range(2):
        labels = [number, 1, 2, 3, 999]
        write_rows(folder / f"train-0000{number}-of-00002.parquet", {"label": labels}, {"label": names})
    write_rows(folder / "validation-00000-of-00001.parquet", {"label": [0, 1, 2, 3, 999]}, {"label": names})


def imagenet_folders(place: Path, hub: Path) -> None:
    ids = ("n01440764", "n01443537", "n01484850")
    tars = {}
    for id_ in ids:
        _tar(place / "inner.tar", {f"{id_}_{n}.JPEG": picture(n, "JPEG") for n in range(3)})
        tars[f"{id_}.tar"] = (place / "inner.tar").read_bytes()
        _put(place / "imagenet" / "val" / id_ / "ILSVRC2012_val_00000001.JPEG", picture(9, "JPEG"))
    _tar(place / "ILSVRC2012_img_train.tar", tars)


def cifar10(place: Path, hub: Path) -> None:
    folder = hub / "uoft-cs" / "cifar10" / "plain_text"
    write_rows(folder / "train-00000-of-00001.parquet", {"label": [*range(10)] * 30}, {"label": CIFAR}, "img")
    write_rows(folder / "test-00000-of-00001.parquet", {"label": [*range(10)]}, {"label": CIFAR}, "img")


def food101(place: Path, hub: Path) -> None:
    names = [f"dish_{number}" for number in range(101)]
    folder = hub / "ethz" / "food101" / "data"
    for name in ("train-00000-of-00008", "validation-00000-of-00003"):
        write_rows(folder / f"{name}.parquet", {"label": [6, 79, 6, 79, 80, 80]}, {"label": names})


def clothing(place: Path, hub: Path) -> None:
    root = place / "clothing-dataset-small"
    _put(root / "README.md", "# Clothing dataset (small)")
    kinds = "dress hat longsleeve outwear pants shirt shoes shorts skirt t-shirt"
    for kind in kinds.split():
        for number in range(20):
            _put(root / "train" / kind / f"{kind}-{number}.jpg", picture(number, "JPEG", (40, 60)))


def emoji(place: Path, hub: Path) -> None:
    packages = place / "data" / "npm" / "node_modules"
    codes = [f"{number:04x}" for number in range(0x1F600, 0x1F600 + 70)] + ["0023-fe0f-20e3"]
    for vendor in ("google", "twitter"):
        package = packages / f"emoji-datasource-{vendor}"
        _put(
            package / "emoji.json", json.dumps([{"unified": code, "image": f"{code}.png"} for code in codes])
        )
        for number, code in enumerate(codes):
            _put(package / "img" / vendor / "64" / f"{code}.png", picture(number, size=(64, 64)))
    for language in ("en", "de", "fr", "es", "ja", "zh", "ar", "hi", "sw", "ru", "tr", "ko"):
        said = {
            chr(0x1F600 + n): {"tts": [f"{language} face {n}"], "default": [f"{language} face {n}", "smile"]}
            for n in range(70)
        }
        for package, folder, entries in (
            ("cldr-annotations-full", "annotations", said),
            (
                "cldr-annotations-derived-full",
                "annotationsDerived",
                {"#\u20e3": {"tts": [f"{language} key"]}},
            ),
        ):
            content = {folder: {"identity": {"language": language}, "annotations": entries}}
            _put(packages / package / folder / language / "annotations.json", json.dumps(content))


def xm3600(place: Path, hub: Path) -> None:
    languages = [f"l{number:02d}" for number in range(35)] + ["en"]
    lines, members = [], {}
    for number in range(4):
        key = f"{number:016x}"
        said = {
            language: {"caption": [f"{language} one {number}", f"{language} two {number}"],
                       "caption/tokenized": [["x"]], "caption/tokenized/lowercase": [["x"]]}
            for language in languages
        }  # fmt: skip
        lines.append(json.dumps({"image/key": key, "image/locale": "en", **said}, ensure_ascii=False))
        members[f"{key}.jpg"] = picture(number, "JPEG")
    with zipfile.ZipFile(_made(place / "xm3600" / "captions.zip"), "w") as archive:
        archive.writestr("captions.jsonl", "\n".join(lines) + "\n")
    _tar(place / "xm3600" / "images.tgz", members, "w:gz")


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


STORES: dict[str, Callable[[Path, Path], None]] = {
    store.__name__: store
    for store in (cc3m, cc12m, datacomp, coco, coco_karpathy, imagenet, imagenet_folders, cifar10, food101,
                  clothing, emoji, xm3600)
}  # fmt: skip
