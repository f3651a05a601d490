"""What `make setup` installs: one file for each Python, all versions in it, and such that this project allows."""

import re
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [
    version
    for version in (f"3.{minor}" for minor in range(30))
    if f"{version}.0" in SpecifierSet(PROJECT["requires-python"])
]


def requirements(extra: str | None = None) -> Iterator[Requirement]:
    """What pyproject.toml asks for, with what the extras ask for that an extra is made of."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            for inner in requirement.extras:
                yield from requirements(inner)
        else:
            yield requirement


def test_there_is_a_file_for_every_python() -> None:
    files = {path.name for path in ROOT.glob("constraints-*.txt")}
    assert files == {f"constraints-{version}.txt" for version in PYTHONS}


@pytest.mark.parametrize("python", PYTHONS)
def test_a_file_has_a_version_for_every_dependency_and_nothing_else(python: str) -> None:
    lines = (ROOT / f"constraints-{python}.txt").read_text().splitlines()
    pins = dict(
        re.fullmatch(r"([\w.-]+)==([\w.!]+)", line).groups() for line in lines if not line.startswith("#")
    )
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    assert PROJECT["name"] not in versions
    assert {"pip", "setuptools"} <= versions.keys()
    for requirement in (*requirements(), *requirements("dev")):
        assert requirement.specifier.contains(
            versions[canonicalize_name(requirement.name)], prereleases=True
        ), f"{requirement} does not allow the constraint"
