"""What is installed from a wheel, away from this checkout, has all its files and trains."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

PACKAGES = ("siglip_train", "kernels", "data_tools", "conf")


def checked(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, as setuptools leaves folders beside the source."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / "source" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    checked(sys.executable, *build, folder / "source", cwd=folder)
    return next(folder.glob("*.whl"))


def test_a_wheel_has_every_module_and_every_config(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    # texts and the figures beside them are for those who have the source
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".md", ".svg", ".pyc")}
    assert wanted - inside == set()
    assert "conf/experiment/quickstart.yaml" in wanted


def show_dependencies(packages: Path) -> None:
    """Put what the project needs without extras, and what that needs, into an empty environment, as links."""
    waiting, seen = list(importlib.metadata.requires("siglip-train") or []), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not wanted or requirement.name in seen:
            continue
        seen.add(requirement.name)
        found = importlib.metadata.distribution(requirement.name)
        waiting += found.requires or []
        for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not name.endswith(".pth") and not (packages / name).exists():
                (packages / name).symlink_to(found.locate_file(name))


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_makes_data_trains_and_evaluates_from_another_folder(
    wheel: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    show_dependencies(packages)
    install = ("install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    checked(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    home = tmp_path / "elsewhere"
    home.mkdir()
    where = checked(
        python, "-c", "import siglip_train, conf; print(siglip_train.__file__, conf.__file__)", cwd=home
    )
    assert str(ROOT) not in where
    checked(
        python, "-c", "import importlib.util; assert importlib.util.find_spec('pytest') is None", cwd=home
    )

    checked(python.with_name("siglip-data"), "make-tiny", "data/tiny", "--samples", "600", cwd=home)
    short = ("global_batch_size=24", "stop_after_steps=2", "data.workers=0", "evaluation.batch_size=32")
    checked(
        python.with_name("siglip-train"),
        "experiment=quickstart",
        "run_dir=run",
        "device=cpu",
        *short,
        cwd=home,
    )
    assert (home / "run" / "report.html").is_file()
    assert "val/seen/" in (home / "run" / "metrics.jsonl").read_text()
    said = checked(python.with_name("siglip-convert"), "run", "export", "--to", "native", cwd=home)
    assert "parameters" in said
