"""The rules of the house: modules have captions, configs compose, targets import, and no drawer for odds and ends."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from siglip_train.data.config import DataConfig
from siglip_train.errors import UserError
from siglip_train.runtime import check_kernels_package
from siglip_train.typed import build
from tests.composing import composed, filled, names
from tests.conftest import ROOT
from tests.house.module_map import PACKAGES, module_map

EXPERIMENTS = names("experiment")
LENGTHS = ("total_samples", "total_epochs")
DATA = [name for name in names("data") if name != "none"]


def source_files() -> set[str]:
    files = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    return {name for name in files if (ROOT / name).stat().st_size > 0}


def test_every_module_has_a_docstring_for_the_map() -> None:
    lines = module_map(ROOT)
    assert {line.path for line in lines} == source_files()
    assert [line.path for line in lines if not line.caption] == [], "modules without a docstring"


def test_no_file_is_named_after_nothing() -> None:
    names = {Path(name).stem for name in source_files()}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_its_values_win(name: str) -> None:
    base, config = composed(), composed(f"experiment={name}")
    assert [config[name] for name in LENGTHS] != [base[name] for name in LENGTHS]
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert re.search(rf"^#.*experiment={name}\b", text, re.MULTILINE), (
        "an experiment is headed by its command"
    )


@pytest.mark.parametrize("name", DATA)
def test_every_data_config_composes_in_place_of_an_experiments(name: str) -> None:
    alone = composed(f"data={name}")["data"]
    data = filled("experiment=quickstart", f"data={name}")["data"]
    assert data["sources"] == alone["sources"] != {}
    assert build(DataConfig, data).sources.keys() == data["sources"].keys()
    assert composed("experiment=quickstart", "data=none")["data"]["sources"] == {}


def targets(node: object) -> list[str]:
    if isinstance(node, dict):
        return [value for key, value in node.items() if key == "_target_"] + [
            found for value in node.values() for found in targets(value)
        ]
    return [found for item in node for found in targets(item)] if isinstance(node, list) else []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_target_imports(name: str) -> None:
    found = targets(composed(f"experiment={name}"))
    assert found
    for target in found:
        module, _, attribute = target.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), target


def test_transformers_imports_beside_our_kernels_package() -> None:
    """Hugging Face's kernels package shares the import name; transformers probes for it (design §2)."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    code = "import kernels, siglip_train; from transformers import SiglipModel; print(kernels.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert str(ROOT / "kernels") in result.stdout


def test_a_foreign_kernels_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels")
    foreign = importlib.import_module("kernels")
    monkeypatch.setattr("siglip_train.runtime.kernels", foreign)
    with pytest.raises(UserError, match="pip uninstall kernels"):
        check_kernels_package()


def test_kernels_needs_torch_alone() -> None:
    """A drop-in for others: no module of this project, none of its other dependencies."""
    code = (
        "import sys, kernels; bad = [m for m in sys.modules if m.split('.')[0] in "
        "('siglip_train', 'deepspeed', 'hydra', 'omegaconf', 'webdataset', 'open_clip', 'rich')]; "
        "sys.exit(str(bad) if bad else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_no_weights_are_unpickled() -> None:
    """torch.load only with weights_only=True: a checkpoint must not be able to run code."""
    for name in source_files():
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", (ROOT / name).read_text()):
            assert "weights_only=True" in call, f"{name}: {call}"


def test_only_tests_and_benchmarks_read_files_that_no_user_has() -> None:
    """Everything else reads what one can get: `siglip-data recipes` says how."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout of git to list the files of")
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    elsewhere = [name for name in names if not name.startswith(("tests/", "benchmarks/"))]
    assert len(elsewhere) > 100
    private = b"../shared"
    assert [name for name in elsewhere if private in (ROOT / name).read_bytes()] == []
