"""Which implementation of an op runs: the Triton kernel or torch. Tests and benchmarks may force one."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

Implementation = Literal["triton", "chunked"]

# NOTE: the Triton kernels have been run by the interpreter and compiled for three architectures, but not yet run on
# a GPU. Until their tests have passed on one, nobody's training rests on them; then this becomes "triton".
ON_GPU: Implementation = "chunked"

_forced: list[Implementation] = []


def implementation(tensor: Tensor) -> Implementation:
    """`ON_GPU` for fp32, bf16 and fp16 on an NVIDIA GPU from Ampere on, else "chunked"."""
    if _forced:
        return _forced[-1]
    is_narrow = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return ON_GPU if is_narrow and tensor.is_cuda and _has_triton(tensor.device) else "chunked"


@contextmanager
def force(name: Implementation) -> Iterator[None]:
    """Within it, every op runs as `name`. On a CPU, "triton" needs TRITON_INTERPRET=1 before triton is imported."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Within it, Triton launches on the GPU of `tensor`, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _has_triton(device: torch.device) -> bool:
    # the kernels have PTX in them: no AMD
    is_nvidia = torch.version.cuda is not None
    return (
        is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0) and find_spec("triton") is not None
    )
