"""Plain values, as YAML and JSON give them, as dataclasses: every key and type is checked once, where they come in."""

import dataclasses
import difflib
import re
import types
import typing
from typing import Any, Literal, TypeVar

from siglip_train.errors import UserError

T = TypeVar("T")
REQUIRED = "???"  # OmegaConf's mark for a value that must be given


def build(config_class: type[T], values: Any, path: str = "") -> T:
    """Make the dataclass `config_class` from a plain mapping, checking keys and types.

    Raises `UserError` naming the key, the value and what was expected.
    """
    where = path or "the config"
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a group of keys, got {_shown(values)}")
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{join(path, key)}: no such key{suggest(key, fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values and values[name] != REQUIRED:
            arguments[name] = _convert(values[name], hints[name], join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{join(path, name)}: a value is required, give {join(path, name)}=…")
    try:
        return config_class(**arguments)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def join(path: str, key: Any) -> str:
    """`key` as it is called in the whole: `path.key`."""
    return f"{path}.{key}" if path else str(key)


def suggest(key: Any, names: Any) -> str:
    """The end of a message about a key that is not there: the nearest of `names`, or all of them."""
    close = difflib.get_close_matches(str(key), [str(name) for name in names], n=1)
    return f", did you mean {close[0]}?" if close else f" (there are: {', '.join(map(str, names))})"


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or dataclasses.is_dataclass(hint):
        return value if hint is Any else build(hint, value, path)  # type: ignore[arg-type]
    if origin is Literal:
        if value in inner:
            return value
        raise UserError(f"{path}: {_shown(value)} is not one of {', '.join(map(repr, inner))}")
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, inner, path)
    if origin is dict:
        # null takes away what an experiment brings: Hydra merges {} into it, which changes nothing
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise UserError(f"{path}: expected a mapping, got {_shown(value)}")
        return {str(key): _convert(item, inner[1], join(path, key)) for key, item in value.items()}
    if origin in (list, tuple):
        return origin(_convert_items(value, inner, path))
    return _convert_scalar(value, hint, path)


def _convert_items(value: Any, inner: tuple, path: str) -> list[Any]:
    """The items of list[T], or of tuple[T, T] whose length is checked."""
    if not isinstance(value, list | tuple) or (len(inner) > 1 and len(value) != len(inner)):
        raise UserError(
            f"{path}: expected a list{f' of {len(inner)}' if len(inner) > 1 else ''}, got {_shown(value)}"
        )
    return [_convert(item, inner[0], f"{path}[{index}]") for index, item in enumerate(value)]


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Every value by its whole key, `{"model.vision.width": 768, …}`."""
    if not isinstance(values, dict):
        return {path: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, join(path, key)))
    return found


def _convert_union(value: Any, options: tuple, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in (option for option in options if option is not type(None)):
        try:
            return _convert(value, option, path)
        except UserError as error:
            errors.append(str(error))
    raise UserError(errors[0])


def _convert_scalar(value: Any, hint: type, path: str) -> Any:
    # people write 4e8 samples, which is a float to Hydra, and text to YAML without a point in it
    if hint is int and isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?e\+?\d+", value):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    # bool is a subclass of int, and YAML reads 1e-3 as text but 1.0e-3 as a number
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{path}: expected {hint.__name__}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
