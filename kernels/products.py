"""Matrix products into a given buffer, summed in fp32 whatever the factors: what the ops leave to the library."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, *, out: Tensor, keep: int) -> None:
    """out = keep * out + a b. out has the dtype of the factors or fp32; keep 0 does not read it."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=keep, out=out)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=keep, out=out)
    else:  # under Triton's interpreter: the CPU has no such product
        with factors_of(a.dtype):
            torch.addmm(out, a.float(), b.float(), beta=keep, out=out)


@contextmanager
def factors_of(dtype: torch.dtype) -> Iterator[None]:
    """Within, a CPU may round the float32 factors of a product to `dtype`, bf16; sums stay float32.

    Three times as fast where there are matrix units (AMX); elsewhere, and for any other dtype, nothing changes. The
    setting is that of the whole process.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if dtype == torch.bfloat16:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
