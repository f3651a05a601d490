"""Loss and gradients of one block of images against one block of texts, by the implementation that fits the tensors.

The single process and the ring call these functions and know nothing of what is below.
"""

from types import ModuleType

from torch import Tensor

from kernels.dispatch import implementation
from kernels.sigmoid_loss import chunked
from kernels.sigmoid_loss.chunked import BlockGradients, Scores
from kernels.sigmoid_loss.pair_ids import PairIds

__all__ = [
    "BlockGradients",
    "Scores",
    "sigmoid_loss_block",
    "sigmoid_loss_block_scores",
    "sigmoid_loss_block_value",
]


def sigmoid_loss_block(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None,
    ids: PairIds | None = None,
) -> BlockGradients:
    """Loss and all four gradients of `[n, E]` images and `[m, E]` texts, in one pass over the logits.

    scale and bias have one element. positives: image i matches text i + positives, where there is one; None if
    nothing matches. ids: pairs that are alike and count otherwise. No n x m tensor is made.
    """
    return _module(images).sigmoid_loss_block(images, texts, scale, bias, positives=positives, ids=ids)


def sigmoid_loss_block_value(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None,
    ids: PairIds | None = None,
) -> Tensor:
    """The loss of `sigmoid_loss_block` alone, at a third of the work: a scalar in float64."""
    return _module(images).sigmoid_loss_block_value(images, texts, scale, bias, positives=positives, ids=ids)


def sigmoid_loss_block_scores(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None,
    ids: PairIds | None = None,
) -> Scores:
    """The losses of the pairs summed for each image and for each text, without gradients."""
    return _module(images).sigmoid_loss_block_scores(images, texts, scale, bias, positives=positives, ids=ids)


def _module(images: Tensor) -> ModuleType:
    if implementation(images) == "chunked":
        return chunked
    # here, because importing Triton takes long and machines without a GPU need not have it
    from kernels.sigmoid_loss import triton_block

    return triton_block
