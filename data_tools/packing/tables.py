"""Records of a table with a column of paths and one of captions: CSV, TSV, JSON lines, a JSON list, Parquet."""

import csv
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.packing.parquet_tables import Cell, parquet_rows
from data_tools.packing.records import CAPTION_FIELDS, IMAGE, Part, Record, SourceOptions, captions_of
from siglip_train.data.faults import SampleError
from siglip_train.errors import UserError

# the last three are img2dataset's, by the format
_IMAGE_COLUMNS = (
    "image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "img", "jpg", "png", "webp",
)  # fmt: skip
# the module's default of 128 KiB is too small for a page of text in a cell
_MAX_CELL = 1 << 27
# rows whose columns are those of the table
_LOOKED_AT = 1000
# what json reads in one process could not be sent to another one
_MAX_DEPTH = 64
# a row, or what is wrong with it
Row = dict[str, Any] | SampleError


def table_records(path: Path, options: SourceOptions) -> list[Record]:
    """A record for every row of a file, the format by its ending. Raises `UserError`."""
    readers = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".jsonl": _json_rows,
        ".ndjson": _json_rows,
    }
    try:
        return row_records(readers[path.suffix.lower()](path), path, options)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def parquet_records(files: Sequence[Path], source: Path, options: SourceOptions) -> list[Record]:
    """A record for every row of Parquet files, which are one table; `source` names them all. Raises `UserError`."""
    return row_records(itertools.chain.from_iterable(map(parquet_rows, files)), source, options)


def row_records(rows: Iterable[Row], path: Path, options: SourceOptions) -> list[Record]:
    """A record for every row; `path` is the file they are from, relative pictures are sought beside it."""
    rows = list(rows)
    first = list(itertools.islice((row for row in rows if isinstance(row, dict)), _LOOKED_AT))
    images = _columns(first, options.image_column, _IMAGE_COLUMNS, path, "image")
    captions = _columns(first, options.caption_column, CAPTION_FIELDS, path, "caption")
    print(f"{path.name}: pictures from column {' or '.join(images)}, captions from column {' or '.join(captions)}",
          file=sys.stderr)  # fmt: skip
    root = options.image_root or str(path.parent)
    return [_record(number, row, root, images, captions) for number, row in enumerate(rows)]


def _columns(
    rows: list[dict[str, Any]], asked: str | None, usual: tuple[str, ...], path: Path, what: str
) -> list[str]:
    """The columns that rows have it in, most often one: rows of JSON need not be alike. Raises `UserError`."""
    names = (asked,) if asked else usual
    used = {_first_of(names, row) for row in rows}
    found = [name for name in names if name in used]
    if not found:
        wanted = asked or f"of {what}s, one called {', '.join(usual)}"
        present = ", ".join(map(str, dict.fromkeys(itertools.chain(*rows)))) or "none"
        raise UserError(
            f"{path} has no column {wanted}; its columns are {present}: name one by --{what}-column"
        )
    return found


def _first_of(names: Iterable[str], row: dict[str, Any]) -> str | None:
    return next((name for name in names if name in row), None)


def _record(number: int, row: Row, root: str, images: list[str], captions: list[str]) -> Record:
    key = f"{number:09d}"
    if isinstance(row, SampleError):
        return Record(key, f"row {number}", fault=(row.cause, row.detail))
    image, caption = (_first_of(names, row) or names[0] for names in (images, captions))
    name = row.get(image)
    if not isinstance(name, str | Cell) or not name:
        return Record(key, f"row {number}", fault=("no image", f"{image} is {name!r:.60}"))
    text, told = captions_of(row.get(caption), row.get("language"))
    # cells beyond the header are under None
    others = {
        column: value.name if isinstance(value, Cell) else value
        for column, value in row.items()
        if column != caption and column is not None and value is not None and not _is_nameless(value)
    }
    if isinstance(name, Cell):
        return Record(key, name.name or f"row {number}", {IMAGE: name}, text, {**others, **told})
    # captions of one picture are rows of their own, and must not meet across the splits
    return Record(
        key, name, {IMAGE: Part.of_file(os.path.join(root, name))}, text, {**others, **told}, group=name
    )


def _is_nameless(value: Any) -> bool:
    return isinstance(value, Cell) and not value.name


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_MAX_CELL)
    # -sig: what spreadsheets write begins with a byte order mark
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        # many a table with tabs is called .csv
        if "\t" in header:
            # a caption that begins with a quote mark would swallow the rows up to the next one
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(file, strict=True)
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
