"""Records of a folder of pictures: everything that belongs to `NAME.jpg` lies beside it as `NAME.txt`, `NAME.json`, ….

This is also what img2dataset writes as files.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from data_tools.packing.records import IMAGE, MASK, Part, Record, key_of
from siglip_train.errors import UserError

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BESIDE = ("txt", "json", MASK, "cls")


def folder_records(folder: Path) -> list[Record]:
    """A record for every picture below `folder`, by path; hidden files and folders are left out."""
    records = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        wanted = [name for name in sorted(files) if _is_wanted(place, name)]
        beside = _by_picture(wanted)
        records += [_record(folder, place, name, beside) for name in wanted if is_picture(name)]
    if not records:
        raise UserError(f"{folder} holds neither pictures ({' '.join(_PICTURES)}) nor tars")
    return records


def _is_wanted(place: str, name: str) -> bool:
    # a link that leads nowhere is no file
    return not name.startswith(".") and os.path.isfile(os.path.join(place, name))


def is_picture(name: str) -> bool:
    """Is it named like a picture, and not like a mask?"""
    return name.lower().endswith(_PICTURES) and not name.lower().endswith(f".{MASK}")


def _by_picture(names: list[str]) -> dict[tuple[str, str], str]:
    """(name of a picture without its ending, kind) -> the file of that kind, whose ending may be in capitals."""
    return {
        (name[: -len(kind) - 1], kind): name
        for kind in _BESIDE
        for name in names
        if name.lower().endswith(f".{kind}")
    }


def _record(folder: Path, place: str, name: str, beside: Mapping[tuple[str, str], str]) -> Record:
    path = os.path.join(place, name)
    stem = os.path.splitext(name)[0]
    files = {IMAGE: name, **{kind: beside[stem, kind] for kind in _BESIDE if (stem, kind) in beside}}
    origin = os.path.relpath(path, folder)
    return Record(
        key=key_of(origin),
        origin=origin,
        parts={kind: Part.of_file(os.path.join(place, file)) for kind, file in files.items()},
        caption_needed="cls" not in files,
    )
