"""Which columns of a table hold images, captions, labels and keys: named by the user, or found by the usual names."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from siglip_train.data.packing.records import CAPTION_FIELDS, SourceOptions
from siglip_train.errors import UserError

# the last three are img2dataset's, by the format
_IMAGE_COLUMNS = (
    "image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "img", "jpg", "png", "webp",
)  # fmt: skip
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls", "category", "target")

Row = dict[str, Any]


class Columns(NamedTuple):
    """The columns of each thing; of images and captions several, since rows of JSON need not be alike.

    captions: may be empty where there are labels. A name that is no column is a path into nested rows (`*.caption`).
    """

    images: list[str]
    captions: list[str]
    label: str | None
    key: str | None
    box: str | None = None

    @property
    def text(self) -> str:
        """For a line on the screen."""
        parts = [f"images from column {' or '.join(self.images)}"]
        parts += [f"captions from column {' or '.join(self.captions)}"] if self.captions else []
        parts += [f"labels from column {self.label}"] if self.label else []
        return ", ".join(parts)


def find_columns(
    rows: Sequence[Row],
    name: str,
    options: SourceOptions,
    classes: Iterable[str],
    image_columns: Iterable[str],
) -> Columns:
    """The columns of `rows`, by their names in any case.

    name: of the table, for messages. classes: columns that the file itself calls classes; image_columns: those
    that hold images. Raises `UserError` where there is none, or where the user's is not there.
    """
    table = _Table(rows, name)
    images = table.find(options.image_column, (*_IMAGE_COLUMNS, *image_columns))
    if not images:
        raise table.missing("image", "--image-column", options.image_column, _IMAGE_COLUMNS)
    captions = table.find(options.caption_column, CAPTION_FIELDS)
    label = _label_column(table, options, [each for each in classes if each in table.columns], captions)
    if not captions and (options.caption_column or label is None):
        either = "--caption-column, or one of labels by --label-column"
        raise table.missing("caption", either, options.caption_column, CAPTION_FIELDS)
    key = table.find(options.key_column, ()) if options.key_column else []
    if options.key_column and not key:
        raise table.missing("key", "--key-column", options.key_column, ())
    box = table.find(options.box_column, ()) if options.box_column else []
    if options.box_column and not box:
        raise table.missing("box", "--box-column", options.box_column, ())
    return Columns(images, captions, label, key[0] if key else None, box[0] if box else None)


def _label_column(
    table: "_Table", options: SourceOptions, classes: list[str], captions: list[str]
) -> str | None:
    if options.label_column:
        found = table.find(options.label_column, ())
        if not found:
            raise table.missing("label", "--label-column", options.label_column, ())
        return found[0]
    if len(classes) > 1 and not captions:
        raise UserError(
            f"{table.name} has labels in columns {', '.join(classes)}: name one by --label-column"
        )
    if len(classes) == 1:
        return classes[0]
    # beside captions, a column of such a name may be anything
    return None if captions else next(iter(table.find(None, _LABEL_COLUMNS)), None)


class _Table:
    """The columns of rows by name. Tables that people keep by hand have them in capitals and with spaces around."""

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        self.rows, self.name = rows, name
        self.columns = list(dict.fromkeys(itertools.chain(*rows)))
        self._spelled = {str(column).strip().casefold(): column for column in reversed(self.columns)}

    def find(self, asked: str | None, usual: Sequence[str]) -> list[str]:
        """The columns that rows have it in, most often one."""
        if asked and "*" in asked.split("."):
            return [asked] if any(value_at(row, asked) for row in self.rows) else []
        names = [asked] if asked else usual
        there = [self._spelled[name.casefold()] for name in names if name.casefold() in self._spelled]
        if asked in self.columns:
            there = [asked]
        used = {first_of(there, row) for row in self.rows}
        return [name for name in dict.fromkeys(there) if name in used]

    def missing(self, what: str, option: str, asked: str | None, usual: Sequence[str]) -> UserError:
        wanted = asked or f"of {what}s, one called {', '.join(usual)}"
        present = ", ".join(map(str, self.columns)) or "none"
        return UserError(
            f"{self.name} has no column {wanted}; its columns are {present}: name one by {option}"
        )


def first_of(names: Iterable[str], row: Row) -> str | None:
    """The first of the columns that a row has."""
    return next((name for name in names if name in row), None)


def value_at(row: Row, name: str) -> Any:
    """What a row has in a column; of a path with stars, such as `*.caption`, {what stands for the star: value}."""
    return row[name] if name in row else _inside(row, name.split("."))


def _inside(node: Any, path: Sequence[str]) -> Any:
    if not path:
        return node
    if not isinstance(node, dict):
        return None
    if path[0] != "*":
        return _inside(node.get(path[0]), path[1:])
    below = {name: _inside(value, path[1:]) for name, value in node.items()}
    return {name: value for name, value in below.items() if value is not None}
