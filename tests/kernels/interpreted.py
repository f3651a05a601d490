"""Runs a file of Triton tests in a process of its own: on a GPU compiled, elsewhere by Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT


def compiled_on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that calls `run_cases`: on a machine with a GPU it is one of `make test-gpu`."""
    return pytest.mark.gpu(test) if torch.cuda.is_available() else test


def run_cases(file: Path, selected: str = "", tier: str = "not slow") -> None:
    """The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, for a whole process.

    selected: as pytest's `-k`. tier: as its `-m`.
    """
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", selected, "-m", tier]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    if "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("the interpreter of this Triton (3.6) does not run with this numpy (2.4)")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
