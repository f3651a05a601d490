"""Hydra in, plain values out: compose YAML and overrides; defaults of dataclasses, and the objects that nodes name.

Below the entry points there are only plain dataclasses. Defaults live in them and nowhere else: Hydra is handed
their values as its base config, so that `--cfg job` shows all keys and a typo is an error.
"""

import dataclasses
import os
import re
import sys
import typing
from collections.abc import Callable
from typing import Any

import hydra
import omegaconf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from siglip_train.errors import UserError
from siglip_train.typed import REQUIRED, join, suggest

CONFIG_MODULE = "pkg://conf"


def defaults_of(config_class: type) -> dict[str, Any]:
    """The defaults of a config dataclass as a plain nested dict; a field without default becomes `???`."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            value: Any = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif dataclasses.is_dataclass(hints[field.name]):
            value = defaults_of(hints[field.name])  # type: ignore[arg-type]
        else:
            value = REQUIRED
        values[field.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def run_hydra(
    function: Callable[[omegaconf.DictConfig, omegaconf.DictConfig | None], None],
    *,
    config_name: str,
    config_class: type,
    open_groups: tuple,
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and hand the result to `function`.

    Beside it, what its experiment composes to without the other overrides of the command line; None without experiment.
    open_groups: prefixes such as `data.sources.` below which the user may invent keys without Hydra's `+`.
    Raises `UserError` for whatever Hydra or OmegaConf find wrong with the command line or a file.
    """
    ConfigStore.instance().store(name=f"{config_name}_defaults", node=defaults_of(config_class))
    sys.argv[1:] = [_open(readable(argument), open_groups) for argument in sys.argv[1:]]
    # Hydra would print its own errors with advice about HYDRA_FULL_ERROR and exit with status 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    composed: list[tuple[omegaconf.DictConfig, omegaconf.DictConfig | None]] = []

    def keep(config: omegaconf.DictConfig) -> None:
        experiment = HydraConfig.get().runtime.choices.get("experiment")
        # here, where a folder of the user's own experiments is searched too
        written = hydra.compose(config_name, overrides=[f"experiment={experiment}"]) if experiment else None
        composed.append((config, written))

    try:
        hydra.main(version_base="1.3", config_path=CONFIG_MODULE, config_name=config_name)(keep)()
    except (HydraException, omegaconf.errors.OmegaConfBaseException, ValueError) as error:
        # a ValueError where a group is set to null
        raise UserError(_first_cause(error, config_class)) from None
    # outside Hydra, which would print a line of its own for every exception of a job; several with --multirun
    for config, written in composed:
        function(config, written)


def readable(argument: str) -> str:
    """An override as Hydra can read it, its value in quotes where it cannot: `run_dir=runs/epoch=9`, braces, an é.

    What begins a list, a mapping or a quote was meant for Hydra, and stays. Raises `UserError` that names the key where
    it cannot be read in quotes either.
    """
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals or _fault(argument) is None:
        return argument
    # backslashes in front of a quote would escape it
    inside = re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", value))
    quoted = f"{key}='{inside}'"
    if value[:1] not in ("[", "{", "(", '"', "'") and _fault(quoted) is None:
        return quoted
    raise UserError(
        f"{key.lstrip('+')}: cannot read the value {value} ({_fault(argument)}); a text with special characters stands"
        f" in quotes of its own, inside those of the shell: '{key}=\"…\"'"
    )


def _fault(argument: str) -> str | None:
    """What Hydra finds wrong with the form of an override."""
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException as error:
        return str(error).splitlines()[0]
    return None


def _open(argument: str, open_groups: tuple) -> str:
    return f"++{argument}" if argument.startswith(open_groups) else argument


def _first_cause(error: BaseException, config_class: type) -> str:
    """Hydra's message in one line, with the nearest key when one was mistyped."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    options = getattr(error, "options", None)
    if options:
        # a file that is not there; below stand the options, a line each, and where they were looked for
        name = str(getattr(error, "missing_cfg_file", "")).rpartition("/")[2]
        return f"{lines[0]}{suggest(name, options)}"
    key = getattr(error, "full_key", None)
    if key and "not in" in lines[0]:
        return f"{key}: no such key{suggest(key, _all_keys(defaults_of(config_class)))}"
    return " ".join(lines[:2])


def _all_keys(values: dict[str, Any], path: str = "") -> list[str]:
    keys = []
    for name, value in values.items():
        keys.append(join(path, name))
        if isinstance(value, dict):
            keys += _all_keys(value, join(path, name))
    return keys


def plain(config: omegaconf.DictConfig) -> dict[str, Any]:
    """A composed config as a nested dict, interpolations resolved, and `~/` the home folder wherever it stands."""
    return typing.cast(dict[str, Any], _at_home(omegaconf.OmegaConf.to_container(config, resolve=True)))


def _at_home(value: Any) -> Any:
    # a shell expands a tilde only where a word begins with it, which that of key=~/… does not
    if isinstance(value, dict):
        return {name: _at_home(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def instantiate(node: dict[str, Any], path: str) -> Any:
    """Make the object that a `_target_` node names; a wrong target or argument is a `UserError` naming `path`."""
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{path}: has no _target_ (which class should it be?)")
    for key, value in node.items():
        if value == REQUIRED:
            raise UserError(f"{path}.{key}: a value is required, give {path}.{key}=…")
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except (HydraException, ValueError) as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # type: ignore[assignment]
        raise UserError(f"{path}: {' '.join(str(cause).split())}") from None


def instantiate_all(nodes: dict[str, Any], path: str) -> dict[str, Any]:
    """Make what each node names; a node set to null is left out."""
    return {name: instantiate(node, f"{path}.{name}") for name, node in nodes.items() if node is not None}
