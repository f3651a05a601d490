"""What `--keys` prints: every key of a config with its default and its meaning, read from the dataclasses themselves.

A class says what its keys mean in its docstring, as `key: meaning.` or `key, another: meaning.`; a meaning goes on to
the next key, or to the end of the paragraph.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import yaml

from siglip_train.errors import UserError
from siglip_train.evals.loader import EvaluationSource
from siglip_train.objectives.base import Objective
from siglip_train.typed import REQUIRED, join, suggest

# what stands for a name that the user invents
NAME = "NAME"


class Key(NamedTuple):
    """A key, or a group of keys.

    default: as it is written, `REQUIRED` where a value must be given, None for a group. values: what the key takes.
    """

    path: str
    default: str | None
    values: str
    meaning: str


def print_keys(config_class: type, arguments: Sequence[str]) -> bool:
    """Print what `--keys [PREFIX]` asks for, and say whether a command line does.

    Raises `UserError` for a prefix of no key.
    """
    if "--keys" not in arguments:
        return False
    others = [argument for argument in arguments if argument != "--keys"]
    if len(others) > 1:
        raise UserError(f"--keys takes one beginning of a key, such as --keys optim, not {' '.join(others)}")
    print(described(config_class, others[0].rstrip(".") if others else ""))  # noqa: T201
    return True


def described(config_class: type, prefix: str) -> str:
    """The keys of a config that begin with `prefix`, as text. Raises `UserError` where there are none."""
    keys = list(keys_of(config_class))
    found = [key for key in keys if _begins_with(key.path, prefix)]
    if not found:
        raise UserError(f"--keys {prefix}: no such key{suggest(prefix, [key.path for key in keys])}")
    width = min(100, max(60, shutil.get_terminal_size().columns))
    return "\n".join(_entry(key, width) for key in found).lstrip("\n")


def keys_of(config_class: type, path: str = "") -> Iterator[Key]:
    """Every key below a config dataclass, groups before what is in them."""
    meanings, hints = meanings_of(config_class), typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        where, hint = join(path, field.name), hints[field.name]
        inner, step = _dataclass_in(hint)
        if inner is None:
            yield Key(where, _default(field), values_of(hint), meanings.get(field.name, ""))
            yield from _open_group(where)
            continue
        nested = hint is inner
        meaning = " ".join(filter(None, (meanings.get(field.name), summary_of(inner))))
        yield Key(where + step, None if nested or step else _default(field), "", meaning)
        yield from keys_of(inner, where + step)


def meanings_of(described_class: type) -> dict[str, str]:
    """What the docstring of a class, and those of its bases, say of each of its keys."""
    names = sorted(_parameters(described_class), key=len, reverse=True)
    if not names:
        return {}
    one = f"(?:{'|'.join(names)})"
    begin = re.compile(rf"(?:^|(?<=[.;)] ))({one}(?:, {one})*): ")
    meanings: dict[str, str] = {}
    for base in described_class.__mro__:
        for paragraph in inspect.cleandoc(base.__dict__.get("__doc__") or "").split("\n\n"):
            text = " ".join(paragraph.split())
            _, *parts = begin.split(text)
            for keys, meaning in zip(parts[::2], parts[1::2], strict=True):
                for key in keys.split(", "):
                    meanings.setdefault(key, re.sub(r" (Raises|Metrics) .*", "", meaning).strip())
    return meanings


def summary_of(described_class: type) -> str:
    """The first line of a class's docstring."""
    return inspect.cleandoc(described_class.__doc__ or "").splitlines()[0]


def values_of(hint: Any) -> str:
    """What a key of this type takes, in the words of a config file; "" where the type does not say."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(str(value) for value in inner)
    if origin in (types.UnionType, typing.Union):
        null = ["null"] if type(None) in inner else []
        kinds = [values_of(option) for option in inner if option is not type(None)]
        return " or ".join(dict.fromkeys([*filter(None, kinds), *null]))
    if origin in (list, tuple):
        return "list"
    if origin is dict or hint is dict:
        return "mapping"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}.get(hint, "")


def classes_of(group: str) -> list[type]:
    """The classes of this project that a `_target_` of an open group can name."""
    if group == "objectives":
        return [
            found for found in _classes_in("siglip_train.objectives") if issubclass(found, Objective)
            and found is not Objective
        ]  # fmt: skip
    return [
        found
        for found in _classes_in("siglip_train.evals")
        if {"check", "run"} <= vars(found).keys() and not getattr(found, "_is_protocol", False)
    ]


def target_keys(described_class: type, path: str) -> Iterator[Key]:
    """A class that `_target_` can name, and the keys that its constructor takes."""
    yield Key(f"{path}._target_", _target(described_class), "", summary_of(described_class))
    meanings = meanings_of(EvaluationSource) if path.endswith("tasks." + NAME) else {}
    meanings |= meanings_of(described_class)
    hints = typing.get_type_hints(described_class.__init__)  # type: ignore[misc]  # its own or its base's
    for name, parameter in _parameters(described_class).items():
        default = _default_of_class(described_class, name, parameter)
        yield Key(join(path, name), default, values_of(hints.get(name)), meanings.get(name, ""))


def _open_group(path: str) -> Iterator[Key]:
    """The classes that a mapping of `_target_` nodes can hold."""
    if path in ("objectives", "evaluation.tasks", "tasks"):
        for found in classes_of(path):
            yield from target_keys(found, join(path, NAME))


def _classes_in(package: str) -> list[type]:
    folder = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(folder)]
    return [
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _parameters(described_class: type) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(described_class).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }


def _dataclass_in(hint: Any) -> tuple[type | None, str]:
    """The dataclass that a key holds, and how one of several is written: `.NAME` in a mapping, `[]` in a list."""
    options = [option for option in (typing.get_args(hint) or (hint,)) if option is not type(None)]
    found = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if not isinstance(found, type):
        return None, ""
    return found, {dict: f".{NAME}", list: "[]"}.get(typing.get_origin(hint), "")  # type: ignore[arg-type]


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return _written(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _written(field.default_factory())
    return REQUIRED


def _default_of_class(described_class: type, name: str, parameter: inspect.Parameter) -> str:
    """Of a constructor's parameter; a dataclass makes some defaults anew for each object."""
    if dataclasses.is_dataclass(described_class):
        return _default(next(field for field in dataclasses.fields(described_class) if field.name == name))
    return REQUIRED if parameter.default is inspect.Parameter.empty else _written(parameter.default)


def _written(value: Any) -> str:
    """A value as a config file has it, in one line."""
    plain = _plain(vars(value) if dataclasses.is_dataclass(value) else value)
    if isinstance(plain, str):
        return plain or '""'
    if isinstance(plain, float):
        return str(plain)
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({"_target_": _target(type(value)), **vars(value)})
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _target(named: type) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _begins_with(path: str, prefix: str) -> bool:
    """Whether a key is one of those meant; where it has NAME, any name is."""
    ours, theirs = re.sub(r"\[\d*\]", "", path).split("."), re.sub(r"\[\d*\]", "", prefix).split(".")
    if len(theirs) > len(ours):
        return False
    *whole, last = theirs
    is_below = all(mine in (NAME, wanted) for mine, wanted in zip(ours, whole, strict=False))
    return is_below and (ours[len(whole)].startswith(last) or ours[len(whole)] == NAME)


def _entry(key: Key, width: int) -> str:
    notes = ["required"] if key.default == REQUIRED else []
    notes += [key.values] if key.values else []
    head = key.path if key.default in (None, REQUIRED) else f"{key.path} = {key.default}"
    head += f"   ({', '.join(notes)})" if notes else ""
    return "\n".join(
        [head, *textwrap.wrap(key.meaning, width, initial_indent="    ", subsequent_indent="    ")]
    )
