"""What surrounds a run: seeds, the environment report, and the check that `kernels` is ours."""

import platform
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from siglip_train.errors import UserError
from siglip_train.redact import redacted_values

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "pillow", "webdataset", "hydra-core", "open_clip_torch")


def check_kernels_package() -> None:
    """Refuse to run on Hugging Face's `kernels` package, which shares its import name with ours."""
    if not hasattr(kernels, "sigmoid_loss"):
        raise UserError(
            f"the package 'kernels' at {kernels.__file__} is not this project's (Hugging Face's kernels has the same "
            "import name): uninstall it with 'pip uninstall kernels', then install this project again"
        )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; the same on every rank, as all ranks must build the same weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # for libraries that draw from the global state
    torch.manual_seed(seed)


def environment() -> dict[str, Any]:
    """Versions, machine and revision, stored with each run."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor_name(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "revision": _revision(),
        "command": redacted_values(sys.argv),
        **{package: package_version(package) for package in PACKAGES},
    }


def package_version(name: str) -> str:
    """The version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _revision() -> str:
    """The git revision of the checkout this runs from, `-dirty` when it differs."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown, as there is no git"
    return result.stdout.strip() or "not a checkout"
