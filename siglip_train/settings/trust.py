"""What a config that is read back from a run may do: name this project's evaluators and objectives, and no command.

The run may be a stranger's. What stands on one's own command line, or in a file it names, is not asked.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

from siglip_train.data.remote.locations import runs_a_program
from siglip_train.errors import UserError
from siglip_train.objectives.base import Objective
from siglip_train.redact import HIDDEN
from siglip_train.typed import join

_EVALUATORS, _OBJECTIVES = "siglip_train.evals.", "siglip_train.objectives."
_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def check_read_back(
    nodes: dict[str, Any], path: str, *, where: str, trusted_packages: Sequence[str] = (), allow_pipe: bool
) -> None:
    """Refuse `_target_` nodes of the config `where`, read back from a run, that could do more than measure.

    trusted_packages: names of packages whose classes and functions may be named as well. allow_pipe: shards may be
    commands, and URLs of any protocol. Raises `UserError` that names key and remedy. Nothing is imported but
    this project's modules and trusted packages.
    """
    for key, value in _values(nodes, path):
        name = key.rpartition(".")[2]
        if name == "_target_":
            _check_target(value, key, where, trusted_packages)
        elif name.startswith("_"):
            raise UserError(
                f"{key} in {where}: a config that is read back may not hold {name}; {_OWN_COMMAND_LINE}"
            )
        elif isinstance(value, str):
            _check_text(value, key, where, allow_pipe=allow_pipe)


_OWN_COMMAND_LINE = "give evaluation=NAME, or tasks.NAME… on your own command line"


def _values(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth; items of lists under the key of their list."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _values(value, join(path, key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _values(value, path)
    else:
        yield path, node


def _check_text(value: str, key: str, where: str, *, allow_pipe: bool) -> None:
    if "${" in value:
        raise UserError(
            f"{key} in {where}: ${{…}} is not resolved in a config that is read back; {_OWN_COMMAND_LINE}"
        )
    if HIDDEN in value:
        raise UserError(
            f"{key} in {where} held a secret, which runs do not keep ({value[:200]!r}); {_OWN_COMMAND_LINE}"
        )
    if not allow_pipe and runs_a_program(value):
        raise UserError(
            f"{key} in {where} would run a command: {value[:200]!r}; look at it, and give allow_pipe=true if it may"
        )


def _check_target(target: Any, key: str, where: str, trusted_packages: Sequence[str]) -> None:
    if not isinstance(target, str) or not _DOTTED_NAME.fullmatch(target):
        raise UserError(f"{key} in {where}: {target!r} is not the dotted name of a class")
    module_name, _, name = target.rpartition(".")
    package = target.partition(".")[0]
    is_ours = target.startswith((_EVALUATORS, _OBJECTIVES))
    if not is_ours and package not in trusted_packages:
        raise UserError(
            f"{key} in {where}: {target} is not one of this project's evaluators, and a config that is read back may "
            f"name no other; if you trust the package, give 'trusted_packages=[{package}]'"
        )
    try:
        named = vars(importlib.import_module(module_name)).get(name)
    except ImportError:
        # a path through a class or a module that it imports, such as evals.base.os, is no module either
        named = None
    # what a module has imported from elsewhere is not its own
    if not isinstance(named, type | FunctionType) or named.__module__.partition(".")[0] != package:
        raise UserError(f"{key} in {where}: there is no class {target}")
    if is_ours and not _is_evaluator_or_objective(named):
        raise UserError(f"{key} in {where}: {target} is neither an evaluator nor an objective")


def _is_evaluator_or_objective(named: Any) -> bool:
    if not isinstance(named, type) or not named.__module__.startswith((_EVALUATORS, _OBJECTIVES)):
        return False
    return issubclass(named, Objective) or all(
        callable(getattr(named, name, None)) for name in ("check", "run")
    )
