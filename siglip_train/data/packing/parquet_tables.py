"""Rows of a Parquet file, and the images inside it: bytes, or structs {bytes, path} as Hugging Face writes them.

A file may be a URL: of one that is remote, no more than the columns that are asked for is read, and it is not kept.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from siglip_train.data.packing.records import Part
from siglip_train.data.remote.locations import filesystem_of, is_remote
from siglip_train.data.remote.retry import USUAL
from siglip_train.errors import SampleError, UserError, said

try:
    import pyarrow
    import pyarrow.parquet as parquet
except ImportError:
    # optional: for Parquet alone
    parquet = None

# what another attempt would not change
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
Result = TypeVar("Result")


class Cell(NamedTuple):
    """An image in row `row` of row group `group`, read when it is packed.

    size: bytes of the row group, which tell when the file has changed. name: what the struct calls it, "" = nothing.
    """

    path: str
    group: int
    row: int
    column: str
    size: int
    name: str = ""

    def read(self) -> bytes:
        """The bytes; of a struct without them, those of the file it names.

        Raises `SampleError`, and OSError where a remote file cannot be had: that is no fault of the sample.
        """
        try:
            value = _column(self.path, self.group, self.column)[self.row].as_py()
        except (OSError, ValueError) as error:  # pyarrow's own errors are these
            if is_remote(self.path):
                raise
            raise SampleError("read error", f"{self.path}: {error}") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and self.name:
            return Part(os.path.join(os.path.dirname(self.path), self.name)).read()
        if data is None:
            raise SampleError("no image", f"{self.column} is empty")
        return data


# records come in the order of the rows, and a row group is read as a whole
@functools.lru_cache(1)
def _column(path: str, group: int, column: str) -> Any:
    return _read(path, lambda file: file.read_row_group(group, columns=[column]).column(0))


def _read(path: str, wanted: Callable[[Any], Result]) -> Result:
    """What `wanted` takes from the open file. A remote one is tried again, with growing pauses.

    Raises OSError and ValueError, as pyarrow does, and `UserError`.
    """
    if parquet is None:
        raise UserError(f"reading {path} needs pyarrow: pip install 'siglip-train[parquet]'")
    if not is_remote(path):
        return wanted(parquet.ParquetFile(path))
    for attempt in range(1, USUAL.attempts):
        try:
            return _read_remote(path, wanted)
        except _FINAL:
            raise
        except Exception:  # whatever the filesystem behind the URL raises
            time.sleep(USUAL.pause(attempt))
    return _read_remote(path, wanted)


def _read_remote(path: str, wanted: Callable[[Any], Result]) -> Result:
    filesystem, inside = filesystem_of(path)
    try:
        # pyarrow asks for the very bytes it needs: reading ahead would fetch the images between two columns
        with filesystem.open(inside, "rb", cache_type="none") as stream:
            return wanted(parquet.ParquetFile(stream))
    except (*_FINAL, ValueError):
        raise
    except Exception as error:  # whatever the filesystem behind the URL raises
        raise OSError(f"cannot read {path}: {said(error)}") from error


def parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    """Every row, with a `Cell` for every image inside the file. Raises `UserError`."""
    try:
        groups = _read(path, lambda file: [_group_rows(file, path, n) for n in range(file.num_row_groups)])
    except (OSError, ValueError) as error:  # pyarrow's own errors are these
        raise UserError(f"cannot read {path}: {error}") from error
    for rows in groups:
        yield from rows


def class_columns(path: str) -> dict[str, list[str]]:
    """The columns that Hugging Face calls labels, each with the names of its classes. Raises `UserError`."""
    try:
        features = _read(path, _features)
    except (OSError, ValueError) as error:  # pyarrow's own errors are these
        raise UserError(f"cannot read {path}: {error}") from error
    return {
        name: list(map(str, feature["names"]))
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _features(file: Any) -> dict[str, Any]:
    """What `datasets` has written about the columns, nothing where another program wrote the file."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _group_rows(file: Any, path: str, group: int) -> list[dict[str, Any]]:
    size = file.metadata.row_group(group).total_byte_size
    images = [field.name for field in file.schema_arrow if _holds_bytes(field.type)]
    # the images themselves are not read: of a struct the name alone
    columns = [field.name for field in file.schema_arrow if field.name not in images]
    named = [name for name in images if _has_names(file.schema_arrow.field(name).type)]
    rows = file.read_row_group(group, columns=[*columns, *(f"{name}.path" for name in named)]).to_pylist()
    for number, row in enumerate(rows):
        for name in images:
            struct = row.get(name) or {}
            row[name] = Cell(path, group, number, name, size, struct.get("path") or "")
    return rows


def _holds_bytes(kind: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _has_names(kind: Any) -> bool:
    return pyarrow.types.is_struct(kind) and any(
        kind.field(i).name == "path" and pyarrow.types.is_string(kind.field(i).type)
        for i in range(kind.num_fields)
    )
