"""From a chunk of logits to its losses and to the gradient with respect to the logits, by the Triton kernel."""

from torch import Tensor

from kernels.device import device_of
from kernels.linear_cross_entropy.kernel import softmax_kernel

# columns a program takes at a time; the interpreter's time goes by the number of blocks
BLOCK = 2048
WARPS = 8


def losses_and_slopes(
    logits: Tensor,
    targets: Tensor,
    factors: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Losses `[c]`, fp32, of logits + bias, `[c, V]`, fp32, at targets `[c]`.

    slopes: where factor * (softmax - one-hot) goes, rounded to its dtype; it may be logits itself. None: not wanted.
    """
    losses = logits.new_empty(len(logits))
    # what is not there is not read
    destination = losses if slopes is None else slopes
    with device_of(logits.device):
        softmax_kernel[(len(logits),)](
            logits, losses if bias is None else bias.contiguous(), targets.contiguous(),
            losses if factors is None else factors.contiguous(), destination, losses,
            logits.shape[1], logits.stride(0), destination.stride(0),
            BLOCK=block, HAS_BIAS=bias is not None, GRADIENTS=slopes is not None,
            INTERPRETED=not logits.is_cuda, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return losses
