"""Which implementation of an op runs: the Triton kernel, once it has passed its self-check here, or torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from kernels.device import runs_triton
from kernels.testing import Sample

Implementation = Literal["triton", "chunked"]

_forced: list[Implementation] = []


def implementation(tensor: Tensor, op: object, sample: Sample) -> Implementation:
    """ "triton" for fp32, bf16 and fp16 on an NVIDIA GPU from Ampere on, if it is right there; else "chunked".

    op: its `str` is what the warning calls it. The first question for an op, device and dtype compares the kernel with
    torch on the sample; the answer holds for the process. Ranks that come to different answers exchange the same.
    """
    if _forced:
        return _forced[-1]
    is_narrow = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (is_narrow and runs_triton(tensor.device)):
        return "chunked"
    # here, because it imports torch's compiler, and that Triton: seconds, where neither is needed
    from kernels.self_check import passes

    return "triton" if passes(str(op), tensor.device, tensor.dtype, sample) else "chunked"


@contextmanager
def force(name: Implementation) -> Iterator[None]:
    """Within it, every op runs as `name`, unchecked. On a CPU, "triton" needs TRITON_INTERPRET=1 before its import."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
