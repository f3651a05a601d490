"""Loss and gradients of one block of images against one block of texts, by the implementation that fits the tensors.

The single process and every form of exchange call these functions and know nothing of what is below.
"""

from types import ModuleType

from torch import Tensor

from kernels.dispatch import implementation
from kernels.sigmoid_loss import chunked
from kernels.sigmoid_loss.pairs import BlockGradients, Embeddings, PairIds, Pairs, Scores
from kernels.sigmoid_loss.triton.sample import BlockSample


def gradients_of(
    images: Embeddings, texts: Embeddings, pairs: Pairs, *, positives: int | None
) -> BlockGradients:
    """Loss and all four gradients of `[n, E]` images and `[m, E]` texts, in one pass over the logits.

    positives: image i matches text i + positives, where there is one; None if nothing matches. No n x m tensor is made.
    """
    tensors, ids = _given(images, texts, pairs)
    module = _module("sigmoid_loss_block", tensors[0], ids)
    return module.sigmoid_loss_block(*tensors, positives=positives, ids=ids)


def value_of(images: Embeddings, texts: Embeddings, pairs: Pairs, *, positives: int | None) -> Tensor:
    """The loss of `gradients_of` alone, at a third of the work: a scalar in float64."""
    tensors, ids = _given(images, texts, pairs)
    module = _module("sigmoid_loss_block_value", tensors[0], ids)
    return module.sigmoid_loss_block_value(*tensors, positives=positives, ids=ids)


def scores_of(images: Embeddings, texts: Embeddings, pairs: Pairs, *, positives: int | None) -> Scores:
    """The losses of the pairs summed for each image and for each text, without gradients."""
    tensors, ids = _given(images, texts, pairs)
    module = _module("sigmoid_loss_block_scores", tensors[0], ids)
    return module.sigmoid_loss_block_scores(*tensors, positives=positives, ids=ids)


def _given(
    images: Embeddings, texts: Embeddings, pairs: Pairs
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], PairIds | None]:
    """The tensors that an implementation takes: embeddings that travelled narrower come back to their dtype."""
    tensors = images.vectors.to(pairs.dtype), texts.vectors.to(pairs.dtype), pairs.scale, pairs.bias
    if images.ids is None or texts.ids is None:
        return tensors, None
    return tensors, PairIds(images.ids, texts.ids, pairs.same_id_weight)


def _module(op: str, images: Tensor, ids: PairIds | None) -> ModuleType:
    sample = BlockSample(
        op,
        # weighed pairs have a kernel of their own, whatever the weight
        weight=None if ids is None else 0.5 if ids.weight else 0.0,
    )
    if implementation(images, sample, sample) == "chunked":
        return chunked
    # here, because importing Triton takes long and machines without a GPU need not have it
    from kernels.sigmoid_loss.triton import block

    return block
