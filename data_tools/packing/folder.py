"""Records of a folder of pictures: everything that belongs to `NAME.jpg` lies beside it as `NAME.txt`, `NAME.json`, ….

This is also what img2dataset writes as files.
"""

import os
from pathlib import Path

from data_tools.packing.records import IMAGE, Part, Record, key_of
from siglip_train.errors import UserError

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BESIDE = ("txt", "json", "mask.png", "cls")
_MASK = ".mask.png"


def folder_records(folder: Path) -> list[Record]:
    """A record for every picture below `folder`, by path; hidden files and folders are left out."""
    records = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        sizes = {
            name: os.stat(os.path.join(place, name)).st_size for name in files if _is_wanted(place, name)
        }
        records += [_record(folder, place, name, sizes) for name in sorted(sizes) if _is_picture(name)]
    if not records:
        raise UserError(f"{folder} holds neither pictures ({' '.join(_PICTURES)}) nor tars")
    return records


def _is_wanted(place: str, name: str) -> bool:
    # a link that leads nowhere is no file
    return not name.startswith(".") and os.path.isfile(os.path.join(place, name))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(_PICTURES) and not name.endswith(_MASK)


def _record(folder: Path, place: str, name: str, sizes: dict[str, int]) -> Record:
    path = os.path.join(place, name)
    stem = os.path.splitext(name)[0]
    files = {IMAGE: name, **{kind: f"{stem}.{kind}" for kind in _BESIDE if f"{stem}.{kind}" in sizes}}
    origin = os.path.relpath(path, folder)
    return Record(
        key=key_of(origin),
        origin=origin,
        # sizes are part of the fingerprint, by which a changed source is noticed
        parts={kind: Part(os.path.join(place, file), 0, sizes[file]) for kind, file in files.items()},
        caption_needed="cls" not in files,
    )
