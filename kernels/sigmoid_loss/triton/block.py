"""Loss and gradients of a block by the Triton kernels: G of a chunk of rows, then two library products with it."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import normalize, softplus
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.device import device_of
from kernels.products import multiply
from kernels.sigmoid_loss.pairs import BlockGradients, PairIds, Scores, number
from kernels.sigmoid_loss.triton.autotune import MOST_ROWS, Choice, Tuning, rows_class
from kernels.sigmoid_loss.triton.factors import image_factors, text_factors
from kernels.sigmoid_loss.triton.kernel import finish_kernel, sigmoid_tile_kernel
from kernels.sigmoid_loss.triton.masking import marks, place_kernel
from kernels.sigmoid_loss.triton.score_kernel import score_tile_kernel
from kernels.sigmoid_loss.triton.tiles import Tile, choose_chunk_rows, for_alike, for_scores, interpreted_tile

# rows and columns that one program of finish_kernel takes at a time
_FINISH = (8, 256)
# tile columns, of texts, that all images of a chunk meet before the next ones
_BAND = 8
# fp16 ends at 6e-8: times two to this power, G keeps its digits down to a logit of -16
_SHIFT = {torch.float16: 10, torch.bfloat16: 0, torch.float32: 0}


@torch.no_grad()
def sigmoid_loss_block(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None,
    ids: PairIds | None = None,
    chunk_rows: int | None = None,
    tile: Tile | None = None,
) -> BlockGradients:
    """Loss and all four gradients of a block in one pass over its logits; fp32, bf16 or fp16 embeddings.

    images `[n, E]`, texts `[m, E]`; scale and bias have one element. positives: image i matches text
    i + positives, where there is one; None if nothing matches. Memory beside the result: chunk_rows x m elements of
    the embeddings' dtype (by default at most 6 E rows), and a thirtieth of that for places and sums of tiles; in fp32
    also thrice the texts and a chunk (`factors.py`). ids: pairs that are alike.
    """
    block = _Block(images, texts, scale, bias, positives, ids, tile)
    n, m, width = len(images), len(texts), images.shape[1]
    image_gradients = images.new_empty(n, width, dtype=torch.float32)
    text_gradients = (
        texts.new_empty(m, width, dtype=torch.float32) if n else texts.new_zeros(m, width).float()
    )
    totals = images.new_zeros(3, dtype=torch.float64)
    rows = chunk_rows or block.chunk_rows()
    G = block.buffer(min(rows, n))
    for start, chunk in block.chunks(rows):
        totals[:2] += block.tiles(chunk, start, G)
        g, gradients = G[: len(chunk), :m], image_gradients[start : start + len(chunk)]
        multiply(g, block.texts, out=gradients, keep=0)
        multiply(g.T, chunk, out=text_gradients, keep=int(start > 0))
        totals += block.finish(chunk, start, gradients, text_gradients)
    loss, bias_gradient, scale_gradient = totals.unbind()
    text_gradients.mul_(block.scale / (1 << block.shift))
    return BlockGradients(loss, image_gradients, text_gradients, scale_gradient, bias_gradient)


@torch.no_grad()
def sigmoid_loss_block_value(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positives: int | None,
    ids: PairIds | None = None,
    chunk_rows: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The loss of `sigmoid_loss_block` alone, at a third of the work: a scalar in float64."""
    block = _Block(images, texts, scale, bias, positives, ids, tile)
    loss = images.new_zeros((), dtype=torch.float64)
    for start, chunk in block.chunks(chunk_rows or block.chunk_rows()):
        loss += block.tiles(chunk, start, None)[0] + block.finish(chunk, start, None, None)[0]
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
    chunk_rows: int | None = None,
    tile: Tile | None = None,
) -> Scores:
    """The loss of each image and of each text, the sums of the block's rows and columns; no gradients.

    Memory beside the result: chunk_rows x m / 32 elements of fp32, the sums and places of tiles of 128 x 128.
    """
    block = _Block(images, texts, scale, bias, positives, ids, tile)
    image_scores = images.new_empty(len(images), dtype=torch.float32)
    text_scores = texts.new_zeros(len(texts), dtype=torch.float64)
    for start, chunk in block.chunks(chunk_rows or block.chunk_rows()):
        rows, columns = block.scores(chunk, start)
        text_scores += columns
        matching_rows, matching_columns, losses = block.matching_pairs(chunk, start)
        rows[matching_rows] += losses
        text_scores[matching_columns] += losses
        image_scores[start : start + len(chunk)] = rows
    return Scores(image_scores, text_scores.float())


class _Block:
    """The inputs of one call as the kernels take them, and their launches."""

    def __init__(
        self,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        positives: int | None,
        ids: PairIds | None,
        tile: Tile | None,
    ) -> None:
        self.images, self.texts = images.contiguous(), texts.contiguous()
        self.scale, self.bias = scale.float().reshape(1), bias.float().reshape(1)
        self.shift = _SHIFT[images.dtype]
        self._positives = positives
        self._tile, self._rows = _choose(self.images, self.texts, tile)
        self._ids = None if ids is None else number(ids)
        self._weight = 0.0 if ids is None else ids.weight
        self._text_factors = text_factors(self.texts, self._tile.depth)
        self._marks = marks(self._tile.images, self._text_factors.dtype, texts.device)
        self._is_interpreted = not images.is_cuda

    def chunk_rows(self) -> int:
        return self._rows

    def chunks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self.images), rows):
            yield start, self.images[start : start + rows]

    def buffer(self, rows: int) -> Tensor:
        """Room for whole tiles, so that the kernel stores without a mask, and rows are aligned."""
        shape = [
            triton.cdiv(size, side) * side
            for size, side in ((rows, self._tile.images), (len(self.texts), self._tile.texts))
        ]
        return self.images.new_empty(shape)

    def tiles(self, chunk: Tensor, start: int, G: Tensor | None) -> Tensor:
        """Write G of a chunk `[c, E]` (None: not wanted); give the sums of loss and of G, float64 `[2]`."""
        n, m = len(chunk), len(self.texts)
        grid = self._grid(n, m)
        sums = torch.zeros(2, grid[0] * grid[1], 2, device=chunk.device)
        X, Y = image_factors(chunk, self._tile.depth), self._text_factors
        with device_of(chunk.device):
            places = self._places(start, n)
            for turn in self._turns():
                tile = for_alike(self._tile) if turn else self._tile
                sigmoid_tile_kernel[grid](
                    self._source(X, tile.images), self._source(Y, tile.texts), self.scale, self.bias,
                    sums if G is None else self._destination(G), sums[turn],
                    self._marks, *(places or (sums, sums)), n, m, X.shape[1],
                    0 if G is None else G.stride(0), self._weight,
                    BN=tile.images, BM=tile.texts, BD=tile.depth, BAND=_BAND, PARTS=tile.parts,
                    CHECKED=places is not None, ALIKE=turn == 1, GROUP=tile.group,
                    DESCRIPTORS=tile.descriptors, GRADIENTS=G is not None, SHIFT=self.shift,
                    INTERPRETED=self._is_interpreted,
                    num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
                )  # fmt: skip
        return sums.sum((0, 1), dtype=torch.float64)

    def scores(self, chunk: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Losses of a chunk `[c, E]`, but of matching pairs, summed for each image `[c]` and text `[m]`, float64."""
        tile, (n, m) = for_scores(self._tile), (len(chunk), len(self.texts))
        high, wide = triton.cdiv(n, tile.images), triton.cdiv(m, tile.texts)
        row_sums = torch.empty(wide, high * tile.images, device=chunk.device)
        column_sums = torch.empty(high, wide * tile.texts, device=chunk.device)
        X, Y = image_factors(chunk, tile.depth), self._text_factors
        with device_of(chunk.device):
            places = self._places(start, n)
            for turn in self._turns():
                score_tile_kernel[self._grid(n, m)](
                    self._source(X, tile.images), self._source(Y, tile.texts), self.scale, self.bias,
                    row_sums, column_sums, self._marks, *(places or (row_sums, row_sums)),
                    n, m, X.shape[1], self._weight,
                    BN=tile.images, BM=tile.texts, BD=tile.depth, BAND=_BAND, PARTS=tile.parts,
                    CHECKED=places is not None, ALIKE=turn == 1, DESCRIPTORS=tile.descriptors,
                    INTERPRETED=self._is_interpreted,
                    num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
                )  # fmt: skip
        return row_sums.sum(0, dtype=torch.float64)[:n], column_sums.sum(0, dtype=torch.float64)[:m]

    def matching_pairs(self, chunk: Tensor, start: int) -> tuple[slice, slice, Tensor]:
        """Rows of a chunk `[c, E]` that have a match, the rows of those texts, and their losses, float64."""
        offset = self._offset(start)
        first, end = max(0, -offset), max(0, -offset, min(len(chunk), len(self.texts) - offset))
        rows, columns = slice(first, end), slice(first + offset, end + offset)
        cosines = (chunk[rows].float() * self.texts[columns].float()).sum(1)
        return rows, columns, softplus(-(cosines * self.scale + self.bias).double())

    def finish(
        self, chunk: Tensor, start: int, image_gradients: Tensor | None, text_gradients: Tensor | None
    ) -> Tensor:
        """Add the matching pairs; give their loss and bias gradient and the scale gradient of all, float64 `[3]`."""
        programs = triton.cdiv(len(chunk), _FINISH[0])
        sums = torch.zeros(programs, 3, device=chunk.device)
        with device_of(chunk.device):
            finish_kernel[(programs,)](
                chunk, self.texts, self.scale, self.bias,
                sums if image_gradients is None else image_gradients,
                sums if text_gradients is None else text_gradients,
                sums, len(chunk), len(self.texts), chunk.shape[1], self._offset(start),
                BN=_FINISH[0], BD=_FINISH[1], GRADIENTS=image_gradients is not None, SHIFT=self.shift,
                INTERPRETED=self._is_interpreted,
            )  # fmt: skip
        return sums.sum(0, dtype=torch.float64)

    def _grid(self, n: int, m: int) -> tuple[int, int]:
        """Programs of a band, bands."""
        return _BAND * triton.cdiv(n, self._tile.images), triton.cdiv(m, self._tile.texts * _BAND)

    def _places(self, start: int, rows: int) -> tuple[Tensor, Tensor] | None:
        """Which pairs of a chunk's tiles do not count, as `place_kernel` writes it; None if all do."""
        tile, m = self._tile, len(self.texts)
        has_edge = rows % tile.images != 0 or m % tile.texts != 0
        if not has_edge and self._positives is None and self._ids is None:
            return None
        grid = self._grid(rows, m)
        places = self.texts.new_empty(grid[0] * grid[1], 2, tile.images + tile.texts, dtype=torch.int16)
        depths = places.new_empty(len(places), dtype=torch.int32)
        row_ids = sorted_ids = column_ids = depths
        if self._ids is not None:
            row_ids = self._ids.images[start : start + rows]
            row_ids = torch.nn.functional.pad(row_ids, (0, -rows % tile.images), value=-1)
            sorted_ids = row_ids.view(-1, tile.images).sort(dim=1).values
            column_ids = self._ids.texts
        place_kernel[grid](
            self.scale, row_ids, sorted_ids, column_ids, places, depths, rows, m, self._offset(start),
            BN=tile.images, BM=tile.texts, BAND=_BAND, HAS_IDS=self._ids is not None,
        )  # fmt: skip
        return places, depths

    def _turns(self) -> range:
        """All tiles; then, of those that have some, the pairs with equal ids, if they count."""
        return range(2 if self._weight else 1)

    def _offset(self, start: int) -> int:
        # from m on, no row has a match
        return len(self.texts) if self._positives is None else self._positives + start

    def _source(self, embeddings: Tensor, rows: int) -> Any:
        if not self._tile.descriptors:
            return embeddings
        return TensorDescriptor.from_tensor(embeddings, [rows, self._tile.depth])

    def _destination(self, G: Tensor) -> Any:
        tile = self._tile
        if not tile.descriptors:
            return G
        return TensorDescriptor.from_tensor(G, [tile.images, tile.texts // tile.parts])


def _choose(images: Tensor, texts: Tensor, tile: Tile | None) -> Choice:
    if tile is None and images.is_cuda:
        return tuning_of(images, texts).choice()
    rows, width = images.shape
    chunk_rows = max(1, choose_chunk_rows(rows, width, _multiprocessors(images.device)))
    return Choice(tile or interpreted_tile(images.element_size()), chunk_rows)


def tuning_of(images: Tensor, texts: Tensor) -> Tuning:
    """The case of a block on a GPU, and how to run (at most `MOST_ROWS` rows of) it with another choice."""

    def run(choice: Choice) -> BlockGradients:
        scale, bias = images.new_tensor([10.0, -10.0], dtype=torch.float32).unbind()
        some = images[:MOST_ROWS], texts[:MOST_ROWS]
        tile, chunk_rows = choice
        return sigmoid_loss_block(*some, scale, bias, positives=0, tile=tile, chunk_rows=chunk_rows)

    return Tuning.of(images, texts, triton.__version__, _multiprocessors(images.device), run)


def tune(n: int, m: int, d: int, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """Try all candidates for blocks of n images and m texts of width d on the current GPU, and keep the fastest.

    A minute or less; every later call with shapes of this class uses the result, in other processes too. Raises
    ValueError without a GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune: there is no CUDA device to measure on")
    images, texts = (
        normalize(torch.randn(rows_class(rows), d, device="cuda"), dim=-1).to(dtype) for rows in (n, m)
    )
    return tuning_of(images, texts).search()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
