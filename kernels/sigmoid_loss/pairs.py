"""Embeddings as they travel, and the loss of pairs of two such blocks: what every form of exchange is made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.sigmoid_loss.block import BlockGradients, sigmoid_loss_block, sigmoid_loss_block_value
from kernels.sigmoid_loss.pair_ids import PairIds


class Embeddings(NamedTuple):
    """A block of images or texts: `[n, E]`, and ids that say which of them are alike, int64 `[n]`, or None."""

    vectors: Tensor
    ids: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What is sent when the block travels."""
        return [self.vectors] if self.ids is None else [self.vectors, self.ids]

    def rows(self, part: slice) -> "Embeddings":
        """Some of the rows, not copied."""
        return Embeddings(*(tensor[part] for tensor in self.tensors))

    def new_empty(self, rows: int) -> "Embeddings":
        """Room for a block of so many rows."""
        return Embeddings(*(tensor.new_empty(rows, *tensor.shape[1:]) for tensor in self.tensors))


class Pairs(NamedTuple):
    """What the loss of a pair depends on beside its two embeddings.

    dtype: of the embeddings as they were given; those that travelled narrower come back to it before they are used.
    """

    scale: Tensor
    bias: Tensor
    same_id_weight: float
    dtype: torch.dtype

    def zeros(self, like: Tensor) -> Tensor:
        """Where gradients of embeddings are summed: zeros of that shape, in the dtype of `BlockGradients`."""
        return torch.zeros_like(like, dtype=torch.promote_types(self.dtype, torch.float32))


def make_pairs(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ids: PairIds | None
) -> tuple[Embeddings, Embeddings, Pairs]:
    """The arguments of `gradients_of` and `value_of`, from those of a block."""
    image_ids, text_ids, weight = ids or (None, None, 1.0)
    return (
        Embeddings(images, image_ids),
        Embeddings(texts, text_ids),
        Pairs(scale, bias, weight, images.dtype),
    )


def gradients_of(
    images: Embeddings, texts: Embeddings, pairs: Pairs, *, positives: int | None
) -> BlockGradients:
    """`sigmoid_loss_block` of the two."""
    return sigmoid_loss_block(
        images.vectors.to(pairs.dtype),
        texts.vectors.to(pairs.dtype),
        pairs.scale,
        pairs.bias,
        positives=positives,
        ids=_ids(images, texts, pairs),
    )


def value_of(images: Embeddings, texts: Embeddings, pairs: Pairs, *, positives: int | None) -> Tensor:
    """`sigmoid_loss_block_value` of the two: float64, shape ()."""
    return sigmoid_loss_block_value(
        images.vectors.to(pairs.dtype),
        texts.vectors.to(pairs.dtype),
        pairs.scale,
        pairs.bias,
        positives=positives,
        ids=_ids(images, texts, pairs),
    )


def totals_of(block: BlockGradients) -> Tensor:
    """Loss and the gradients of scale and bias, float64 `[3]`."""
    return torch.stack([block.loss, block.scale, block.bias])


def _ids(images: Embeddings, texts: Embeddings, pairs: Pairs) -> PairIds | None:
    if images.ids is None or texts.ids is None:
        return None
    return PairIds(images.ids, texts.ids, pairs.same_id_weight)
