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


def dtype_of_products(factors: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """What unit vectors are rounded to before they are multiplied: an op's `compute_dtype`. ValueError for others.

    None: fp16 for fp32 factors under a 16-bit autocast of either kind, as the towers' own rounding is coarser and unit
    vectors need no range; else their own.
    """
    if wanted is not None:
        if wanted not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"compute_dtype must be float16, bfloat16, float32 or None; got {wanted!r}")
        return wanted
    device = factors.device.type
    if factors.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return factors.dtype
    return torch.float16 if torch.get_autocast_dtype(device).itemsize == 2 else torch.float32
