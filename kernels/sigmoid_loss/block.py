"""Loss and gradients of one block of images against one block of texts, by the implementation that fits the tensors.

The single process and the ring call these functions and know nothing of what is below.
"""

from types import ModuleType

from torch import Tensor

from kernels.dispatch import implementation
from kernels.sigmoid_loss import chunked
from kernels.sigmoid_loss.chunked import BlockGradients, Scores
from kernels.sigmoid_loss.pair_ids import PairIds
from kernels.sigmoid_loss.sample import BlockSample

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
    module = _module("sigmoid_loss_block", images, ids)
    return module.sigmoid_loss_block(images, texts, scale, bias, positives=positives, ids=ids)


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
    module = _module("sigmoid_loss_block_value", images, ids)
    return module.sigmoid_loss_block_value(images, texts, scale, bias, positives=positives, ids=ids)


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
    module = _module("sigmoid_loss_block_scores", images, ids)
    return module.sigmoid_loss_block_scores(images, texts, scale, bias, positives=positives, ids=ids)


def _module(op: str, images: Tensor, ids: PairIds | None) -> ModuleType:
    sample = BlockSample(
        op,
        # weighed pairs have a kernel of their own, whatever the weight
        weight=None if ids is None else 0.5 if ids.weight else 0.0,
    )
    if implementation(images, str(sample), sample) == "chunked":
        return chunked
    # here, because importing Triton takes long and machines without a GPU need not have it
    from kernels.sigmoid_loss import triton_block

    return triton_block
