"""Evaluation sets that are a folder: CLIP_benchmark's layout of shards, or images in one folder a class."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from siglip_train.data.shards.reader import RawSample
from siglip_train.data.shards.select import Selection
from siglip_train.errors import UserError
from siglip_train.files.atomic import read_text

# endings of images, in any case; those that Pillow cannot read, for want of a plugin, count as broken
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(
        ".avif",
        ".avifs",
        ".heic",
        ".heif",
        ".jxl",
        ".jp2",
        ".j2k",
        ".jpx",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tga",
    ),
)
_NSHARDS = "nshards.txt"
# folders of these names alone are parts of a set, not classes
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing"))


@dataclass(frozen=True)
class BenchmarkFolder:
    """A set as CLIP_benchmark lays it out: `root/{train,test}/{nshards.txt,0.tar,…}` and text files about it."""

    root: Path
    split: Path

    def shards(self) -> list[str]:
        """The shards in the order of their numbers: sorted as text, 10 would come before 2."""
        count = _read(self.split / _NSHARDS)
        if count is None:
            return [str(path) for path in sorted(self.split.glob("*.tar"), key=_number_first)]
        if not count.strip().isdigit() or int(count) == 0:
            raise UserError(f"{self.split / _NSHARDS} holds {count.strip()!r}, not the number of shards")
        return [str(self.split / f"{number}.tar") for number in range(int(count))]

    @property
    def classnames(self) -> list[str] | None:
        """The names of the classes, in label order."""
        return _lines(self.root / "classnames.txt")

    @property
    def templates(self) -> list[str] | None:
        """The prompt templates; `siglip-data pack` gives the file a shorter name."""
        theirs = _lines(self.root / "zeroshot_classification_templates.txt")
        return _lines(self.root / "templates.txt") if theirs is None else theirs

    @property
    def type(self) -> str:
        """`classification`, `retrieval` (a `txt` holds a caption a line) or `multilabel`."""
        return (_read(self.root / "dataset_type.txt") or "classification").strip().lower()


def benchmark_folder(shards: str | Sequence[str]) -> BenchmarkFolder | None:
    """Recognise the root of such a set, of which the test split is meant, or one of its splits."""
    path = _folder(shards)
    if path is None:
        return None
    if (path / _NSHARDS).is_file():
        return BenchmarkFolder(path.parent, path)
    test = path / "test"
    if (test / _NSHARDS).is_file() or next(test.glob("*.tar"), None):
        return BenchmarkFolder(path, test)
    return None


@dataclass(frozen=True)
class ClassFolder:
    """Images as `root/CLASS/…/FILE`, read as samples with the members `image` and `cls`.

    files: paths below root and the label of each, class by class. Folders that are all numbers are labels themselves
    (ImageNet-v2 is laid out so); else they count in sorted order, which for ImageNet's WordNet ids is the order of
    everyone's class lists. others: paths of files that are no images by their endings.
    """

    root: Path
    files: list[tuple[str, int]]
    others: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, place: int) -> tuple[str, str]:
        """(name of the root, key), for messages. The key is the path without the ending."""
        return self.root.name, _key(self.files[place][0])

    def read(self, place: int) -> RawSample:
        """The bytes of an image and its label."""
        path, label = self.files[place]
        members = {"image": (self.root / path).read_bytes(), "cls": str(label).encode()}
        return RawSample(*self.name(place), members)


def class_folder_names(shards: str | Sequence[str]) -> dict[int, str]:
    """Give the folders of a folder of classes by label; none where it is something else.

    Raises `UserError` where they are splits, each of which is such a folder.
    """
    root = _folder(shards)
    if root is None or benchmark_folder(shards) is not None or _has_shards(root):
        return {}
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    if names and all(name.lower() in _SPLITS for name in names):
        raise UserError(
            f"{root} holds the splits {', '.join(names)}, not classes: name one of them, such as {root / names[0]}"
        )
    is_numbered = all(name.isdigit() for name in names)
    return dict(sorted((int(name) if is_numbered else place, name) for place, name in enumerate(names)))


def class_folder(
    shards: str | Sequence[str], extensions: Sequence[str], select: Selection
) -> ClassFolder | None:
    """Find the images of a folder of classes; None where it is something else or has none.

    Images are files with one of the usual endings or of the `extensions`.
    """
    names = class_folder_names(shards)
    root = _folder(shards)
    if root is None:
        return None
    endings = (*IMAGE_ENDINGS, *(f".{extension}" for extension in extensions))
    found = [(path, label) for label, name in names.items() for path in _files(root, name)]
    files = [
        (path, label) for path, label in found if path.lower().endswith(endings) and _key(path) in select
    ]
    others = [path for path, _ in found if not path.lower().endswith(endings)]
    return ClassFolder(root, files, others) if files else None


def _has_shards(root: Path) -> bool:
    return any(next(root.glob(ending), None) for ending in ("*.tar", "*.tar.gz", "*.tgz"))


def _files(root: Path, name: str) -> list[str]:
    """Paths below root of all files of a class but hidden ones."""
    found = []
    for folder, _, files in os.walk(root / name):
        below = os.path.relpath(folder, root)
        found += [f"{below}/{file}" for file in files if file[0] != "."]
    return sorted(found)


def _key(path: str) -> str:
    return path.rpartition(".")[0]


def _folder(shards: str | Sequence[str]) -> Path | None:
    if not isinstance(shards, str):
        return None
    path = Path(shards).expanduser()
    return path if path.is_dir() else None


def _read(path: Path) -> str | None:
    return read_text(path) if path.is_file() else None


def _lines(path: Path) -> list[str] | None:
    text = _read(path)
    return None if text is None else [line.strip() for line in text.splitlines()]


def _number_first(path: Path) -> tuple[int, str]:
    found = re.search(r"\d+", path.stem)
    return (int(found[0]) if found else -1, path.name)
