"""The loss over the texts of all ranks by the library's collectives: all-gather, one block, reduce-scatter.

Two messages instead of two a hop, and one large block instead of many: it wins where blocks are so small that hops and
launches cost more than pairs. Nothing is hidden, and memory grows with the number of ranks: W n E elements for texts,
and again for their gradients.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.sigmoid_loss.block import gradients_of, value_of
from kernels.sigmoid_loss.exchange.wait_clock import waiting
from kernels.sigmoid_loss.pairs import BlockGradients, Embeddings, Pairs


def gather_gradients(
    images: Embeddings,
    texts: Embeddings,
    pairs: Pairs,
    group: dist.ProcessGroup,
    gradient_dtype: torch.dtype | None,
) -> BlockGradients:
    """What `ring_gradients` gives; gradients of texts travel in gradient_dtype.  # all ranks, with equal shapes"""
    block = gradients_of(images, _gather(texts, group), pairs, positives=_own_place(images, group))
    shares = block.texts if gradient_dtype is None else block.texts.to(gradient_dtype)
    own = shares.new_empty(images.vectors.shape)
    with waiting(own.device):
        dist.reduce_scatter_tensor(own, shares, group=group)
    return block._replace(texts=own.to(block.texts.dtype))


def gather_value(images: Embeddings, texts: Embeddings, pairs: Pairs, group: dist.ProcessGroup) -> Tensor:
    """The loss of `gather_gradients` alone.  # all ranks, with equal shapes"""
    return value_of(images, _gather(texts, group), pairs, positives=_own_place(images, group))


def _gather(texts: Embeddings, group: dist.ProcessGroup) -> Embeddings:
    """The texts of all ranks, in rank order."""
    panel = texts.new_empty(dist.get_world_size(group) * len(texts.vectors))
    with waiting(panel.vectors.device):
        for gathered, mine in zip(panel.tensors, texts.tensors, strict=True):
            dist.all_gather_into_tensor(gathered, mine, group=group)
    return panel


def _own_place(images: Embeddings, group: dist.ProcessGroup) -> int:
    return dist.get_rank(group) * len(images.vectors)
