"""Which devices the Triton kernels are meant for, and launching on one of them."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


def device_of(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, Triton launches on this GPU, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether the kernels are meant for this device: they have PTX in them, so no AMD."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and find_spec("triton") is not None
    )
