"""Matrix products into a given buffer, summed in fp32 whatever the factors: what the ops leave to the library."""

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, *, out: Tensor, keep: int) -> None:
    """out = keep * out + a b. out has the dtype of the factors or fp32; keep 0 does not read it."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=keep, out=out)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=keep, out=out)
    else:  # under Triton's interpreter: the CPU has no such product
        torch.addmm(out, a.float(), b.float(), beta=keep, out=out)
