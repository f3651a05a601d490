"""Which implementation of an op runs: the Triton kernel, once it has passed its self-check here, or torch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.testing import Comparison

Implementation = Literal["triton", "chunked"]
# runs an op both ways on a device in a dtype; must leave the random state alone
Sample = Callable[[torch.device, torch.dtype], Iterable[Comparison]]

_forced: list[Implementation] = []


def implementation(tensor: Tensor, op: str, sample: Sample) -> Implementation:
    """ "triton" for fp32, bf16 and fp16 on an NVIDIA GPU from Ampere on, if it is right there; else "chunked".

    op: what the warning calls it. The first question for an op, device and dtype compares the kernel with torch on
    the sample; the answer holds for the process. Ranks that come to different answers exchange the same.
    """
    if _forced:
        return _forced[-1]
    is_narrow = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (is_narrow and runs_triton(tensor.device)):
        return "chunked"
    # here, because it imports torch's compiler, and that Triton: seconds, where neither is needed
    from kernels.self_check import passes

    return "triton" if passes(op, tensor.device, tensor.dtype, sample) else "chunked"


@contextmanager
def force(name: Implementation) -> Iterator[None]:
    """Within it, every op runs as `name`, unchecked. On a CPU, "triton" needs TRITON_INTERPRET=1 before its import."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


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
