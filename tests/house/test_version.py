"""The version stands in three places that must agree, and is none for which we would be taken for another package."""

import re
import tomllib
from pathlib import Path

import siglip_train

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_package_the_project_and_the_changelog_have_one_version():
    released = re.findall(
        r"^## (\d\S*) – \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert siglip_train.__version__ == VERSION == released[0]


def test_transformers_does_not_take_our_kernels_for_its_own():
    """It probes a package `kernels` and accepts that of a distribution from 0.18.2 to below 0.19.0."""
    assert VERSION != "0.18.2"
    assert not (0, 18) <= tuple(int(part) for part in VERSION.split(".")[:2]) < (0, 19)
