"""A block in torch alone, in row chunks: no n x m tensor. For CPUs and float64, and the check of the Triton kernel."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.products import factors_of
from kernels.sigmoid_loss.pairs import BlockGradients, PairIds, Scores, count_pairs, number

# 512 to 2048 are within 5 per cent of one another on a CPU
CHUNK_ROWS = 512


@torch.no_grad()
def sigmoid_loss_block(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None,
    ids: PairIds | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> BlockGradients:
    """Loss and all four gradients of a block in one pass over its logits.

    images `[n, E]`, texts `[m, E]`; scale and bias have one element. positives: image i matches text
    i + positives, where there is one; None if nothing matches. Memory beside the result: two chunk_rows x m buffers,
    with ids a third and as many bytes.

    Of bf16 input, a CPU with matrix units rounds the weights of pairs to bf16 before they meet the embeddings, as a
    GPU does: 2e-3 of a gradient. The logits are as exact as without.
    """
    given = torch.promote_types(images.dtype, texts.dtype)
    images, texts, scale, bias = _for_accumulation(images, texts, scale, bias)
    image_gradients, text_gradients = torch.empty_like(images), torch.zeros_like(texts)
    loss, scale_gradient, bias_gradient = images.new_zeros(3, dtype=torch.float64).unbind()
    scratch = images.new_empty(min(chunk_rows, len(images)), len(texts))
    with factors_of(given):
        for rows, diagonal, logits, counts in _chunks(images, texts, scale, bias, positives, ids, chunk_rows):
            weights = scratch[: len(logits)]
            loss += _sum(_times(_softplus(logits, out=weights), counts))
            _times(torch.sigmoid(logits, out=weights), counts)  # [c, m], d loss / d signed logit
            if diagonal is not None:
                weights.diagonal(diagonal).neg_()
            bias_gradient += _sum(weights)
            cosine_gradient = torch.mm(weights, texts, out=image_gradients[rows])  # [c, E]
            # sum of weight * cosine over the chunk: the cosines themselves have been overwritten by the logits
            scale_gradient += _sum(images[rows] * cosine_gradient)
            text_gradients.addmm_(weights.T, images[rows])
    return BlockGradients(
        loss, image_gradients.mul_(scale), text_gradients.mul_(scale), scale_gradient, bias_gradient
    )


@torch.no_grad()
def sigmoid_loss_block_value(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None,
    ids: PairIds | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """The loss of `sigmoid_loss_block` alone, at a third of the work: a scalar in float64."""
    given = torch.promote_types(images.dtype, texts.dtype)
    images, texts, scale, bias = _for_accumulation(images, texts, scale, bias)
    loss = images.new_zeros((), dtype=torch.float64)
    with factors_of(given):
        for _, _, logits, counts in _chunks(images, texts, scale, bias, positives, ids, chunk_rows):
            loss += _sum(_times(_softplus(logits, out=logits), counts))
    return loss


@torch.no_grad()
def sigmoid_loss_block_scores(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None,
    ids: PairIds | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Scores:
    """The loss of each image and of each text, the sums of the block's rows and columns; memory as for the value."""
    given = torch.promote_types(images.dtype, texts.dtype)
    images, texts, scale, bias = _for_accumulation(images, texts, scale, bias)
    image_scores = images.new_empty(len(images))
    text_scores = texts.new_zeros(len(texts), dtype=torch.float64)
    with factors_of(given):
        for rows, _, logits, counts in _chunks(images, texts, scale, bias, positives, ids, chunk_rows):
            losses = _times(_softplus(logits, out=logits), counts)
            torch.sum(losses, dim=1, out=image_scores[rows])
            text_scores += losses.sum(dim=0)
    return Scores(image_scores, text_scores.to(texts.dtype))


def _for_accumulation(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bring bf16 and fp16 to fp32: at scale 100, logits rounded to bf16 would be off by up to 0.25."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    return images.to(dtype), texts.to(dtype), scale.to(dtype).reshape(1), bias.to(dtype).reshape(1)


class _Chunk(NamedTuple):
    rows: slice
    diagonal: int | None  # where the matching pairs are
    logits: Tensor  # [c, m], with the sign changed of those that match
    counts: Tensor | None  # [c, m], how many times each pair counts; None: once


def _chunks(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    positives: int | None,
    ids: PairIds | None,
    chunk_rows: int,
) -> Iterator[_Chunk]:
    """The logits of a block, chunk by chunk, in one buffer that is used again and again; so are the counts.

    Logits of matching pairs have their sign changed. Then softplus is the loss of every pair alike, and exact for
    each: nothing large is added and taken away again.
    """
    buffer = images.new_empty(min(chunk_rows, len(images)), len(texts))
    counts_buffer = None if ids is None else torch.empty_like(buffer)
    numbers = None if ids is None else number(ids)
    for start in range(0, len(images), chunk_rows):
        chunk = images[start : start + chunk_rows]
        rows = slice(start, start + len(chunk))
        diagonal = None if positives is None else positives + start
        # the scale comes after the product, whose factors may have to be bf16
        logits = torch.mm(chunk, texts.T, out=buffer[: len(chunk)]).mul_(scale).add_(bias)  # [c, m]
        if diagonal is not None:
            logits.diagonal(diagonal).neg_()
        counts = None
        if numbers is not None and counts_buffer is not None:
            counts = count_pairs(numbers, rows, diagonal, out=counts_buffer[: len(chunk)])
        yield _Chunk(rows, diagonal, logits, counts)


def _times(values: Tensor, counts: Tensor | None) -> Tensor:
    return values if counts is None else values.mul_(counts)


def _softplus(logits: Tensor, *, out: Tensor) -> Tensor:
    # above 40, softplus(x) = x even in float64; the default of 20 is off by 2e-9 there
    return torch.ops.aten.softplus.out(logits, 1, 40, out=out)


def _sum(values: Tensor) -> Tensor:
    # rows in their own dtype, then float64: a whole float64 sum would first make a float64 copy on a CPU
    return values.sum(dim=1).double().sum()
