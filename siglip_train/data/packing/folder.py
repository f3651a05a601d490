"""Records of a folder of images: what belongs to `NAME.jpg` lies beside it, in a table, or is the folder's name.

Beside it are `NAME.txt`, `NAME.json`, …, as img2dataset writes files too; kohya's `NAME.caption` is a `NAME.txt`. The
table is Hugging Face's `metadata.csv` or `metadata.jsonl`. Where no image has any of these, and they lie in several
folders, the folders are classes.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from siglip_train.data.folders import IMAGE_ENDINGS, class_folder_names
from siglip_train.data.packing.labels import caption_of, check_templates
from siglip_train.data.packing.records import IMAGE, MASK, Found, Part, Record, SourceOptions, key_of
from siglip_train.data.packing.tables import row_records, table_rows
from siglip_train.errors import UserError

_LOG = logging.getLogger(__name__)

# the first of a member's endings that is there is taken
_BESIDE = {"txt": ("txt", "caption"), "json": ("json",), MASK: (MASK,), "cls": ("cls",)}
_TABLES = ("metadata.jsonl", "metadata.csv")
# of packed folders and of these tools
_NOT_OURS = ("classnames.txt", "templates.txt", "readme.md", "licence", "license", "dataset_infos.json")


def folder_records(folder: Path, options: SourceOptions) -> Found:
    """A record for every image below `folder`, by path; hidden files and folders are left out.

    Files that are nothing of the above are counted by their endings on the screen. Raises `UserError`.
    """
    records: list[Record] = []
    tables: list[Found] = []
    others: Counter[str] = Counter()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in sorted(files) if _is_wanted(place, name)]
        table = next((name for name in _TABLES if name in names), None)
        tables += [_of_table(folder, Path(place, table), options)] if table else []
        beside = _by_image(names)
        records += [_record(folder, place, name, beside) for name in names if is_image_file(name)]
        known = {*_TABLES, *_NOT_OURS, *beside.values()}
        others.update(os.path.splitext(name)[1] or name for name in names
                         if name.lower() not in known and name not in known and not is_image_file(name))  # fmt: skip
    if others:
        counted = ", ".join(f"{ending} {count}" for ending, count in others.most_common())
        _LOG.info("%s: files that belong to no image are passed over: %s", folder, counted)
    records = _with_rows(records, tables)
    if not records:
        raise UserError(f"{folder} holds neither images ({' '.join(IMAGE_ENDINGS)}) nor tars")
    names = next((table.classnames for table in tables if table.classnames), [])
    return _as_classes(folder, records, options) or Found(records, names)


def _is_wanted(place: str, name: str) -> bool:
    # a link that leads nowhere is no file
    return not name.startswith(".") and os.path.isfile(os.path.join(place, name))


def is_image_file(name: str) -> bool:
    """Is it named like an image, and not like a mask?"""
    return name.lower().endswith(IMAGE_ENDINGS) and not name.lower().endswith(f".{MASK}")


def _by_image(names: Sequence[str]) -> dict[tuple[str, str], str]:
    """(name of an image without its ending, kind) -> the file of that kind, whose ending may be in capitals."""
    stems = {os.path.splitext(name)[0] for name in names if is_image_file(name)}
    return {
        (name[: -len(ending) - 1], kind): name
        for kind, endings in _BESIDE.items()
        for ending in reversed(endings)
        for name in names
        if name.lower().endswith(f".{ending}") and name[: -len(ending) - 1] in stems
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


def _of_table(folder: Path, table: Path, options: SourceOptions) -> Found:
    """Records of a table of the folder it lies in, their images named from `folder` on."""
    place = os.path.relpath(table.parent, folder)
    found = row_records(table_rows(table), os.path.relpath(table, folder), str(table.parent), options)

    def named(record: Record) -> Record:
        if IMAGE not in record.parts:
            return replace(record, key=f"{table.name}/{record.key}")
        origin = os.path.normpath(os.path.join(place, record.origin))
        return replace(record, key=key_of(origin), origin=origin, group="")

    return Found(list(map(named, found.records)), found.classnames)


def _with_rows(records: Sequence[Record], tables: Sequence[Found]) -> list[Record]:
    """The records, with what the tables say of their images; a caption beside an image goes before theirs.

    Several rows of one image follow one another, as do the faults of the tables.
    """
    said: dict[str, list[Record]] = {}
    for row in (record for table in tables for record in table.records):
        said.setdefault(row.origin, []).append(row)
    joined = [each for record in records for each in _joined(record, said.pop(record.origin, []))]
    return joined + [row for rows in said.values() for row in rows]


def _joined(record: Record, rows: Sequence[Record]) -> Iterator[Record]:
    if not rows:
        yield record
    for number, row in enumerate(rows):
        parts = {**row.parts, **record.parts}
        is_labelled = row.label is not None
        # captions of one image are rows of their own, and must not meet across the splits
        key = f"{row.key}-{number}" if number else row.key
        yield replace(row, key=key, parts=parts, group=record.key,
                      caption_needed=record.caption_needed and not is_labelled)  # fmt: skip


def _as_classes(folder: Path, records: Sequence[Record], options: SourceOptions) -> Found | None:
    """The same records labelled by their folders, None where they say more of themselves or lie in one folder."""
    is_bare = all(record.parts.keys() <= {IMAGE, MASK} and not record.text for record in records)
    folders = {record.origin.partition(os.sep)[0] for record in records if os.sep in record.origin}
    is_apart = all(os.sep in record.origin for record in records)
    if not is_bare or not is_apart or len(folders) < 2 or options.caption_column:
        return None
    labels = {name: label for label, name in class_folder_names(str(folder)).items()}
    _LOG.info(
        "%s: no image has a caption; the %d folders are taken for classes (%s%s)",
        *(folder, len(labels), ", ".join(list(labels)[:3]), ", …" * (len(labels) > 3)),
    )
    # folders that are numbers are labels, and say no names
    names = [] if all(name.isdigit() for name in labels) else list(labels)
    templates = options.caption_template
    if templates:
        check_templates(templates, names)
    labelled = []
    for record in records:
        name = record.origin.partition(os.sep)[0]
        text = caption_of(record.key, name, templates) if templates else ""
        labelled.append(
            replace(record, label=labels[name], text=text, facts={"class": name}, caption_needed=False)
        )
    return Found(labelled, names)
