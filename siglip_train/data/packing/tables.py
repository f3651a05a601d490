"""Records of a table with a column of paths and one of captions: CSV, TSV, JSON lines, a JSON list, Parquet."""

import csv
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from siglip_train.data.folders import IMAGE_ENDINGS
from siglip_train.data.packing.columns import Columns, find_columns, first_of, value_at
from siglip_train.data.packing.labels import Labels, caption_of, check_templates, number_classes
from siglip_train.data.packing.parquet_tables import Cell, class_columns, parquet_rows
from siglip_train.data.packing.records import IMAGE, Found, Part, Record, SourceOptions, captions_of, key_of
from siglip_train.errors import SampleError, UserError

_LOG = logging.getLogger(__name__)

# the module's default of 128 KiB is too small for a page of text in a cell
_MAX_CELL = 1 << 27
# rows whose columns are those of the table
_LOOKED_AT = 1000
# what json reads in one process could not be sent to another one
_MAX_DEPTH = 64
# a row, or what is wrong with it
Row = dict[str, Any] | SampleError


def table_records(path: Path, options: SourceOptions) -> Found:
    """A record for every row of a file, the format by its ending. Raises `UserError`."""
    return row_records(table_rows(path), path.name, str(path.parent), options)


def table_rows(path: Path) -> list[Row]:
    """The rows of a table of text, the format by its ending. Raises `UserError`."""
    read = _csv_rows if path.suffix.lower() in (".csv", ".tsv") else _json_rows
    try:
        return list(read(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): convert it by `iconv -f latin1 -t utf-8`") from error


def parquet_records(files: Sequence[str], name: str, options: SourceOptions) -> Found:
    """A record for every row of Parquet files, which are one table called `name`. Raises `UserError`."""
    rows = itertools.chain.from_iterable(map(parquet_rows, files))
    return row_records(rows, name, os.path.dirname(files[0]), options, class_columns(files[0]))


def row_records(
    rows: Iterable[Row], name: str, folder: str, options: SourceOptions,
    classes: Mapping[str, list[str]] | None = None,
) -> Found:  # fmt: skip
    """A record for every row of the table `name`.

    folder: where images of relative paths are, unless the options say. classes: the names of the classes in each
    column that is known to hold labels. Raises `UserError`.
    """
    rows, classes = list(rows), classes or {}
    first = list(itertools.islice((row for row in rows if isinstance(row, dict)), _LOOKED_AT))
    image_columns = dict.fromkeys(
        column for row in first[:1] for column in row if isinstance(row[column], Cell)
    )
    columns = find_columns(first, name, options, classes, image_columns)
    labels = _labels(rows, columns.label, classes)
    known = f" ({len(labels.names)} classes)" if labels.names else ""
    _LOG.info("%s: %s%s", name, columns.text, known)
    templates = options.caption_template or []
    if templates:
        check_templates(templates, labels.names)
    root = options.image_root or folder
    records = [_record(number, row, root, columns) for number, row in enumerate(rows)]
    return Found(list(map(partial(_labelled, names=labels.names, templates=templates), records, labels.of)),
                 labels.names)  # fmt: skip


def _labels(rows: Sequence[Row], column: str | None, classes: Mapping[str, list[str]]) -> Labels:
    if column is None:
        return Labels([None] * len(rows), [])
    values = [row.get(column) if isinstance(row, dict) else None for row in rows]
    return number_classes(values, classes.get(column, ()))


def _labelled(
    record: Record, label: int | SampleError | None, names: Sequence[str], templates: Sequence[str]
) -> Record:
    if label is None or record.fault is not None:
        return record
    if isinstance(label, SampleError):
        return replace(record, fault=(label.cause, label.detail))
    if not names:
        return replace(record, label=label, caption_needed=False)
    text = caption_of(record.key, names[label], templates) if templates else record.text
    facts = {**record.facts, "class": names[label]}
    return replace(record, label=label, text=text, facts=facts, caption_needed=False)


def _record(number: int, row: Row, root: str, columns: Columns) -> Record:
    key = origin = f"{number:09d}"
    if isinstance(row, SampleError):
        return Record(key, f"row {number}", fault=(row.cause, row.detail))
    if columns.key is not None:
        key = key_of(f"{row.get(columns.key)}.") if row.get(columns.key) not in (None, "") else ""
        if not key:
            return Record(origin, f"row {number}", fault=("no key", f"{columns.key} is empty"))
    image = first_of(columns.images, row) or columns.images[0]
    name = row.get(image)
    if not isinstance(name, str | Cell) or not name:
        return Record(key, f"row {number}", fault=("no image", f"{image} is {name!r:.60}"))
    origin = (name.name or f"row {number}") if isinstance(name, Cell) else name
    try:
        text, facts = _text_and_facts(row, columns)
        box = _box(row, columns.box) if columns.box is not None else None
    except SampleError as error:
        return Record(key, origin, fault=(error.cause, error.detail))
    if isinstance(name, Cell):
        return Record(key, origin, {IMAGE: name}, text, facts, box=box)
    # captions of one image are rows of their own, and must not meet across the splits
    file = image_file(os.path.join(root, name))
    return Record(key, origin, {IMAGE: file}, text, facts, group=name, box=box)


def _box(row: dict[str, Any], column: str) -> tuple[float, float, float, float]:
    found = row.get(column)
    if (
        not isinstance(found, list)
        or len(found) != 4
        or not all(isinstance(each, int | float) for each in found)
    ):
        raise SampleError("no box", f"{column} is {found!r:.60}, and not x, y, width, height in pixels")
    return tuple(map(float, found))  # type: ignore[return-value]


def image_file(path: str) -> Part:
    """The file of an image, of which a table may say the name without its ending, as that of Crossmodal-3600 does."""
    if not os.path.splitext(path)[1]:
        path = next((path + ending for ending in IMAGE_ENDINGS if os.path.isfile(path + ending)), path)
    return Part.of_file(path)


def _text_and_facts(row: dict[str, Any], columns: Columns) -> tuple[str, dict[str, Any]]:
    column = next((name for name in columns.captions if name in row), None) or next(
        iter(columns.captions), None
    )
    value = value_at(row, column) if column is not None else None
    text, told = captions_of(value, row.get("language"))
    used = {column, *(value if column not in row and isinstance(value, dict) else ())}
    # cells beyond the header are under None
    others = {
        name: value.name if isinstance(value, Cell) else value
        for name, value in row.items()
        if name not in used and name is not None and value is not None and not _is_nameless(value)
    }
    return text, {**others, **told}


def _is_nameless(value: Any) -> bool:
    return isinstance(value, Cell) and not value.name


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_MAX_CELL)
    # -sig: what spreadsheets write begins with a byte order mark
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        # many a table with tabs is called .csv, and spreadsheets of half the world write semicolons
        if "\t" in header:
            # a caption that begins with a quote mark would swallow the rows up to the next one
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(
                file, delimiter=";" if header.count(";") > header.count(",") else ",", strict=True
            )
        end = 0
        try:
            if rows.fieldnames:
                end = rows.line_num
            for row in rows:
                yield row
                end = rows.line_num
        except csv.Error as error:
            raise UserError(f"cannot read {path}: {error}, in the row that begins in line {end + 1}; "
                            "most often a quote is not closed") from error  # fmt: skip


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield _json_row(line)


def _json_row(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return SampleError("broken json", str(error))
    return checked_row(row)


def checked_row(row: Any) -> Row:
    """What JSON has as a row, which must be an object."""
    if not isinstance(row, dict):
        return SampleError("broken json", "the row is no object")
    if _is_deeper(row, _MAX_DEPTH):
        return SampleError("broken json", f"nested deeper than {_MAX_DEPTH} levels")
    return row


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict | list) and levels == 0:
        return True
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_is_deeper(each, levels - 1) for each in inside)
