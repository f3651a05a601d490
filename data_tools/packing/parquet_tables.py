"""Rows of a Parquet file, and the pictures inside it: bytes, or structs {bytes, path} as Hugging Face writes them."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.packing.records import Part
from siglip_train.data.faults import SampleError
from siglip_train.errors import UserError

try:
    import pyarrow
    import pyarrow.parquet as parquet
except ImportError:
    # optional: for Parquet alone
    parquet = None


class Cell(NamedTuple):
    """A picture in row `row` of row group `group`, read when it is packed.

    size: bytes of the row group, which tell when the file has changed. name: what the struct calls it, "" = nothing.
    """

    path: str
    group: int
    row: int
    column: str
    size: int
    name: str = ""

    def read(self) -> bytes:
        """The bytes; of a struct without them, those of the file it names. Raises `SampleError`."""
        try:
            value = _column(self.path, self.group, self.column)[self.row].as_py()
        except (OSError, ValueError) as error:  # pyarrow's own errors are these
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
    return parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row, with a `Cell` for every picture inside the file. Raises `UserError`."""
    if parquet is None:
        raise UserError(f"reading {path} needs pyarrow: pip install 'siglip-train[parquet]'")
    try:
        file = parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield from _group_rows(file, path, group)
    except (OSError, ValueError) as error:  # pyarrow's own errors are these
        raise UserError(f"cannot read {path}: {error}") from error


def _group_rows(file: Any, path: Path, group: int) -> Iterator[dict[str, Any]]:
    size = file.metadata.row_group(group).total_byte_size
    pictures = [field.name for field in file.schema_arrow if _holds_bytes(field.type)]
    # the pictures themselves are not read: of a struct the name alone
    columns = [field.name for field in file.schema_arrow if field.name not in pictures]
    named = [name for name in pictures if _has_names(file.schema_arrow.field(name).type)]
    rows = file.read_row_group(group, columns=[*columns, *(f"{name}.path" for name in named)]).to_pylist()
    for number, row in enumerate(rows):
        for name in pictures:
            struct = row.get(name) or {}
            row[name] = Cell(str(path), group, number, name, size, struct.get("path") or "")
        yield row


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
