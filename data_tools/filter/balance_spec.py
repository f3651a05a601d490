"""What `--balance FILE` says: attributes and their values, concepts, and the shares that are wanted."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from data_tools.filter.where import Where, compile_pattern
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import UserError
from siglip_train.files.atomic import read_text

AS_IS = "as-is"
_KEYS = {"attributes", "targets", "concepts", "concept_targets", "eps"}
_EPS = 0.01
Shares = Mapping[str, float]


class Trait(NamedTuple):
    """Something that a sample shows or not, by a pattern in one of its captions or by a rule about a field."""

    pattern: re.Pattern[str] | None
    rule: Where | None

    def is_shown(self, sample: RawSample, captions: list[str]) -> bool:
        """Does the sample show it? Raises `SampleError`."""
        if self.rule is not None:
            return self.rule.holds(sample)
        assert self.pattern is not None
        return any(self.pattern.search(caption) for caption in captions)


class BalanceSpec(NamedTuple):
    """attributes: name -> value -> trait. concepts: name -> trait.

    targets: of every attribute the share of each value, None = what it is in the data. concept_targets: concept ->
    attribute -> shares, where they are not those of the attribute. eps: how far shares may stay off.
    """

    attributes: dict[str, dict[str, Trait]]
    concepts: dict[str, Trait]
    targets: dict[str, Shares | None]
    concept_targets: dict[str, dict[str, Shares]]
    eps: float = _EPS

    @property
    def values(self) -> list[tuple[str, str]]:
        """(attribute, value) of every value, in order."""
        return [(name, value) for name, values in self.attributes.items() for value in values]


def load_spec(path: str) -> BalanceSpec:
    """Read a YAML or JSON file. Raises `UserError`."""
    text = read_text(path)
    try:
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    try:
        return parse_spec(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_spec(content: Any) -> BalanceSpec:
    """Check what a file said. Raises `UserError`."""
    content = _mapping(content, "the file")
    unknown = content.keys() - _KEYS
    if unknown:
        raise UserError(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(_KEYS))}")
    attributes = {
        str(name): _traits(values, f"attributes.{name}")
        for name, values in _mapping(content.get("attributes"), "attributes").items()
    }
    few = next((name for name, values in attributes.items() if len(values) < 2), None)
    if few or not attributes:
        raise UserError("attributes needs two values at least" + (f", {few} has one" if few else ""))
    concepts = _traits(content.get("concepts") or {}, "concepts")
    targets = _mapping(content.get("targets") or {}, "targets")
    _known(targets, attributes, "targets")
    concept_targets = _mapping(content.get("concept_targets") or {}, "concept_targets")
    _known(concept_targets, concepts, "concept_targets")
    return BalanceSpec(
        attributes,
        concepts,
        {name: _target(targets.get(name), values, f"targets.{name}") for name, values in attributes.items()},
        {
            name: _concept_targets(shares, attributes, f"concept_targets.{name}")
            for name, shares in concept_targets.items()
        },
        _eps(content.get("eps", _EPS)),
    )


def _concept_targets(content: Any, attributes: Mapping[str, Mapping], where: str) -> dict[str, Shares]:
    content = _mapping(content, where)
    _known(content, attributes, where)
    return {name: _shares(shares, attributes[name], f"{where}.{name}") for name, shares in content.items()}


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a mapping, not {content!r}")
    return content


def _known(names: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    unknown = [str(name) for name in names if name not in known]
    if unknown:
        raise UserError(f"{where} names {', '.join(unknown)}; there are {', '.join(known) or 'none'}")


def _traits(content: Any, where: str) -> dict[str, Trait]:
    return {str(name): _trait(each, f"{where}.{name}") for name, each in _mapping(content, where).items()}


def _trait(content: Any, where: str) -> Trait:
    if isinstance(content, str):
        return Trait(compile_pattern(content, where, re.IGNORECASE), None)
    if isinstance(content, dict) and list(content) == ["where"]:
        return Trait(None, Where.parse(str(content["where"])))
    raise UserError(f"{where} must be a regular expression or {{where: FIELD OP VALUE}}, not {content!r}")


def _target(content: Any, values: Mapping[str, Any], where: str) -> Shares | None:
    if content == AS_IS:
        return None
    if content is None:
        return {value: 1 / len(values) for value in values}
    return _shares(content, values, where)


def _shares(content: Any, values: Mapping[str, Any], where: str) -> Shares:
    content = _mapping(content, where)
    _known(content, values, where)
    missing = [value for value in values if value not in content]
    if missing:
        raise UserError(f"{where} has no share of {', '.join(missing)}")
    numbers = list(content.values())
    if not all(isinstance(each, int | float) and 0 <= each <= 1 for each in numbers):
        raise UserError(f"{where} must be shares from 0 to 1, not {numbers}")
    if abs(sum(numbers) - 1) > 1e-6:
        raise UserError(f"{where} must add up to 1, not {sum(numbers):g}")
    # in the order of the attribute, whatever that of the target is
    return {value: float(content[value]) for value in values}


def _eps(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"eps is {value!r}, but is how far shares may stay off: 0 < eps < 1")
    return float(value)
