"""Pairs that are alike without belonging together: by ids of images and texts, instead of a mask of n x m."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

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
