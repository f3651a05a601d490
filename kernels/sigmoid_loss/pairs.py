"""What the loss of a block is made from and what comes of it: embeddings, pair ids, gradients, scores.

Pairs that are alike without matching are told by ids of images and texts, instead of a mask of n x m.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.testing import Comparison

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# in uint64, half of all hashes would become negative, and so be like nothing
_INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip


class PairIds(NamedTuple):
    """A pair that does not match but has equal ids, not negative, counts `weight` times in loss and gradients.

    images `[n]`, texts `[m]`: int64; a negative id is like nothing else. weight: 0 leaves such pairs out, 1 is as
    without ids. Matching pairs count once, whatever their ids.
    """

    images: Tensor
    texts: Tensor
    weight: float


def make_pair_ids(
    image_ids: Tensor | None, text_ids: Tensor | None, weight: float, embeddings: tuple[Tensor, Tensor]
) -> PairIds | None:
    """What a caller gave for images `[n, E]` and texts `[m, E]`, None for nothing; ValueError if it does not fit."""
    if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
        raise ValueError(
            f"sigmoid_loss: same_id_weight must be a finite number of at least 0; got {weight!r}"
        )
    if image_ids is None and text_ids is None:
        return None
    if image_ids is None or text_ids is None:
        raise ValueError("sigmoid_loss: image_ids and text_ids go together; give both or neither")
    named = ("image_ids", image_ids, embeddings[0]), ("text_ids", text_ids, embeddings[1])
    for name, ids, rows in named:
        if not isinstance(ids, Tensor):
            raise ValueError(f"sigmoid_loss: {name} must be a tensor; got {ids!r:.60}")
        if ids.shape != rows.shape[:1] or ids.dtype not in _INTEGERS or ids.device != rows.device:
            raise ValueError(
                f"sigmoid_loss: {name} must be {len(rows)} integers, int64 or narrower, on {rows.device}; got "
                f"{tuple(ids.shape)} {ids.dtype} on {ids.device}"
            )
    return PairIds(image_ids.long().contiguous(), text_ids.long().contiguous(), abs(float(weight)))


def number(ids: PairIds) -> PairIds:
    """The same ids as int32 numbers that are equal where a pair is alike: one short comparison for each pair.

    An id becomes its place among the sorted ids of the texts. An image without its like gets -1, a text -2.
    """
    known = ids.texts.sort().values
    place = torch.searchsorted(known, ids.images).clamp_(max=len(known) - 1)
    has_like = (known[place] == ids.images) & (ids.images >= 0)
    images = place.masked_fill(~has_like, -1)
    texts = torch.searchsorted(known, ids.texts).masked_fill(ids.texts < 0, -2)
    return PairIds(images.int(), texts.int(), ids.weight)


def count_pairs(ids: PairIds, rows: slice, diagonal: int | None, *, out: Tensor) -> Tensor:
    """How many times each pair of some rows counts, in out `[c, m]`. ids: as `number` gives them."""
    counts = out.fill_(1).masked_fill_(ids.images[rows, None] == ids.texts, ids.weight)
    if diagonal is not None:
        counts.diagonal(diagonal).fill_(1)
    return counts


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


def check_types(op: str, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> None:
    """Raise ValueError, beginning with the name of the op, for dtypes and devices that do not fit one another."""
    named = zip(("images", "texts", "logit_scale", "logit_bias"), (images, texts, scale, bias), strict=True)
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor; got {tensor!r:.60}")
    if images.dtype != texts.dtype or images.dtype not in _FLOATS:
        raise ValueError(
            f"{op}: embeddings must have one floating-point dtype; got images {images.dtype}, texts {texts.dtype}"
        )
    for name, scalar in (("logit_scale", scale), ("logit_bias", bias)):
        if scalar.shape not in ((), (1,)) or not scalar.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be one number of shape () or (1,); got {tuple(scalar.shape)} {scalar.dtype}"
            )
    devices = {tensor.device for tensor in (images, texts, scale, bias)}
    if len(devices) > 1:
        raise ValueError(f"{op}: all inputs must be on one device; got {sorted(map(str, devices))}")


def make_pairs(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ids: PairIds | None
) -> tuple[Embeddings, Embeddings, Pairs]:
    """The arguments of `block.gradients_of` and `block.value_of`, from those of a call."""
    image_ids, text_ids, weight = ids or (None, None, 1.0)
    return (
        Embeddings(images, image_ids),
        Embeddings(texts, text_ids),
        Pairs(scale, bias, weight, images.dtype),
    )


class BlockGradients(NamedTuple):
    """Sums over the pairs of a block, not yet divided by a number of images.

    loss, scale, bias: shape (), float64. images `[n, E]`, texts `[m, E]`: float32, or float64 for float64 input.
    """

    loss: Tensor
    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor


class Scores(NamedTuple):
    """Sums of the pairwise loss: of each image `[n]` and of each text `[m]`; float32, or float64 for float64 input."""

    images: Tensor
    texts: Tensor


def totals_of(block: BlockGradients) -> Tensor:
    """Loss and the gradients of scale and bias, float64 `[3]`."""
    return torch.stack([block.loss, block.scale, block.bias])


def pair_up(actual: tuple | Tensor, expected: tuple | Tensor) -> Iterator[Comparison]:
    """The results of one call of an op of `block.py`, and what they should be."""
    if isinstance(expected, Tensor):
        actual, expected = (actual,), (expected,)
    is_rounded = ("images", "texts", "scale") if isinstance(expected, BlockGradients) else ()
    names = getattr(expected, "_fields", ("loss",))
    for name, found, truth in zip(names, actual, expected, strict=True):
        yield Comparison(name, found, truth, name in is_rounded)
