"""Files in the working folder that are called like modules of Python's: nothing of ours imports them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import losses

# imported by what training imports, and by what its workers do; `html` by both
NAMES = ("html", "queue", "random", "numbers", "secrets", "csv", "zlib")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
ENVIRONMENT.pop("PYTHONSAFEPATH", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with modules that fail when they are imported."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(
            f"raise RuntimeError('{name} of the working folder was imported')\n"
        )
    return tmp_path


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def test_the_commands_do_not_look_there_first(folder: Path, record_fault) -> None:
    result = _run(["-m", "siglip_train.train", "experiment=quickstart", "--cfg", "job"], folder)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "global_batch_size" in result.stdout
    record_fault("html.py in the working folder: a command", ranks=1, happened="not imported")


def test_workers_do_not_look_there_first(
    folder: Path, fault_run: list[str], straight_run: Path, record_fault
) -> None:
    # paths in the experiment are of the checkout
    arguments = [*fault_run, "data.workers=1", f"run_dir={folder}/run", "stop_after_steps=2"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m"]
    # the launcher itself looks there first, so that it is started without
    result = _run(["-P", *launcher, "siglip_train.train", *arguments], folder)
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(folder / "run").keys() == {1, 2}
    record_fault(
        "html.py in the working folder: workers", ranks=1, happened="not imported", lost=0, repeated=0
    )


def test_tools_that_start_processes_do_not_look_there_first(folder: Path, tiny_data: Path) -> None:
    result = _run(["-m", "data_tools", "verify", f"{tiny_data}/train/*.tar", "--workers", "2"], folder)
    assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]


def test_modules_of_ones_own_are_found_there_still(folder: Path) -> None:
    (folder / "mine.py").write_text("")
    (folder / "show").mkdir()
    (folder / "show" / "__init__.py").write_text("import siglip_train\n")
    (folder / "show" / "__main__.py").write_text("import sys, os, mine\nprint(sys.path[-1] == os.getcwd())\n")
    result = _run(["-m", "show"], folder)
    assert result.stdout.strip() == "True", result.stderr


def test_the_users_own_programs_are_started_as_ever(folder: Path) -> None:
    program = (
        "import os; from siglip_train.data.workers import forget_safe_path, safe_path_for_children\n"
        "with safe_path_for_children():\n"
        "    inside = os.environ['PYTHONSAFEPATH']\n"
        "assert 'PYTHONSAFEPATH' not in os.environ\n"
        "os.environ['PYTHONSAFEPATH'] = inside; forget_safe_path(); assert 'PYTHONSAFEPATH' not in os.environ\n"
        "os.environ['PYTHONSAFEPATH'] = '1'; forget_safe_path()\n"
        "with safe_path_for_children():\n"
        "    pass\n"
        "print(os.environ['PYTHONSAFEPATH'])"
    )
    result = _run(["-P", "-c", program], folder)
    assert result.stdout.strip() == "1", result.stderr
