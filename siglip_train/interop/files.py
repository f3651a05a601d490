"""The two kinds of files every weight format is made of: JSON and safetensors. Damage is a `UserError`."""

import json
import logging
import os
import zipfile
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from siglip_train.errors import UserError
from siglip_train.typed import build, join

log = logging.getLogger(__name__)

T = TypeVar("T")

# bytes, as filesystems have it
_LONGEST_NAME = 255
# DistributedDataParallel's, torch.compile's
_WRAPPERS = ("module.", "_orig_mod.")

# names under which torch weights are found in place of safetensors
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def check_file_name(name: str, where: Path) -> None:
    """Raise a `UserError` unless `name`, which stands in the file `where`, is that of a file beside it."""
    is_plain = name not in ("", ".", "..") and Path(name).name == name and name.isprintable()
    if not is_plain or len(name.encode()) > _LONGEST_NAME:
        raise UserError(f"{where} names {name[:100]!r}, which is no file beside it")


def section(kind: type[T], values: Any, where: Path, key: str = "") -> T:
    """The object `values`, which stands under `key` in the JSON file `where`, as the dataclass `kind`.

    Keys that the class lacks are passed over: other libraries keep more than is read here. Raises a `UserError` with
    file and key for a value that is absent or of another type.
    """
    entries = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    if isinstance(values, dict):
        for name, entry in entries.items():
            if name not in values and entry.default is entry.default_factory is MISSING:
                raise UserError(f"{where} lacks {join(key, name)}")
        values = {name: value for name, value in values.items() if name in entries}
    try:
        return build(kind, values, key)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@dataclass
class _Index:
    """Of weights in several files: which file has a tensor."""

    weight_map: dict[str, str]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; where it was split, all files that `<path>.index.json` names."""
    return _unwrapped(
        {name: tensor for file in _weight_files(path) for name, tensor in _read_one(file).items()}, path
    )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that `read_tensors` would read, from the heads of the files alone."""
    return _unwrapped(
        {name: shape for file in _weight_files(path) for name, shape in _shapes_of_one(file).items()}, path
    )


def _unwrapped(named: dict[str, T], path: Path) -> dict[str, T]:
    """Without what torch puts before the names of a module that is compiled or distributed."""
    for wrapper in _WRAPPERS:
        if named and all(name.startswith(wrapper) for name in named):
            log.info("%s: %r before every name is left out, as of a module that was wrapped", path, wrapper)
            return _unwrapped({name.removeprefix(wrapper): value for name, value in named.items()}, path)
    return named


def _weight_files(path: Path) -> list[Path]:
    index = path.with_name(path.name + ".index.json")
    if path.is_file():
        return [path]
    if index.is_file():
        names = sorted(set(section(_Index, read_json(index), index).weight_map.values()))
        for name in names:
            check_file_name(name, index)
        return [path.with_name(name) for name in names]
    pickles = [file for pattern in _PICKLES for file in path.parent.glob(pattern)]
    if pickles:
        refuse_pickle(pickles[0])
    raise UserError(f"{path} does not exist; weights are read from safetensors files only")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, readable for whom the user's other new files are readable."""
    save_file(dict(tensors), path, metadata=metadata)
    # safetensors makes its files private
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def refuse_pickle(path: Path) -> None:
    """Raise a `UserError` if `path` is a pickle, of torch or any other: reading one runs what it says."""
    if _is_pickle(path):
        raise UserError(
            f"{path} is a pickle, which can run any program when it is read; "
            "save the weights as safetensors where they come from"
        )


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    # protocols 2 to 5, which is what torch and numpy have ever written
    return start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")


def _read_one(path: Path) -> dict[str, Tensor]:
    if path.is_file():
        refuse_pickle(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}; copy the file again") from error


def _shapes_of_one(path: Path) -> dict[str, tuple[int, ...]]:
    if path.is_file():
        refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}; copy the file again") from error


def shortened(names: set[str] | list[str], limit: int = 6) -> str:
    """Names for a message: sorted, at most `limit` of them, and how many more."""
    ordered = sorted(names)
    more = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {more} more" if more > 0 else "")
