"""The loss on a grid of ranks: a rank keeps the texts of its column, and the images of its row travel past them.

Rank (r, c) of R x C computes the images of row r against the texts of column c: every pair once. R + C - 2 hops where
the ring has R C - 1, at the price of R blocks of texts and of their gradients in memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.sigmoid_loss.block import gradients_of, value_of
from kernels.sigmoid_loss.exchange.messages import BlockStream, GradientStream, Ring
from kernels.sigmoid_loss.exchange.route import Route, node_route, round_trip
from kernels.sigmoid_loss.pairs import BlockGradients, Embeddings, Pairs, totals_of


class Grid(NamedTuple):
    """This rank's row, along which images travel, and its column, along which texts are gathered (None: it is alone).

    Rank r C + c of the group is at (r, c).
    """

    row: Route
    column: Ring | None


def grid_through(
    group: dist.ProcessGroup, grid_rows: int, ranks_per_node: int, gradient_dtype: torch.dtype | None
) -> Grid:
    """The grid of `grid_rows` rows, a divisor of the group's size. A row of several whole nodes is a ring of rings."""
    size = dist.get_world_size(group)
    columns = size // grid_rows
    row, column = divmod(dist.get_rank(group), columns)
    rings = node_route(group, range(row * columns, (row + 1) * columns), ranks_per_node)
    return Grid(
        Route(rings, gradient_dtype), Ring(group, range(column, size, columns)) if grid_rows > 1 else None
    )


def grid_gradients(images: Embeddings, texts: Embeddings, pairs: Pairs, grid: Grid) -> BlockGradients:
    """What `ring_gradients` gives: the sums of an image travel home with its gradient.  # all ranks of the grid"""
    panel = _Panel(texts, grid.column)
    sums = _PanelGradients(panel, pairs, grid)

    def visit(guest: Embeddings, rows: slice, is_home: bool) -> list[Tensor]:  # noqa: FBT001
        gradients = pairs.zeros(guest.vectors)
        totals = gradients.new_zeros(3, dtype=torch.float64)
        is_last = is_home and rows.stop == panel.size
        for piece in panel.pieces(rows, block_by_block=is_last):
            if is_last:
                # a hop for each piece, so that it is on its way while the piece is computed
                sums.pass_on_complete(piece.start)
            block = gradients_of(
                guest, panel.texts.rows(piece), pairs, positives=panel.positives(piece, is_home=is_home)
            )
            sums.gradients[piece] += block.texts
            gradients += block.images
            totals += totals_of(block)
        return [gradients, totals]

    image_gradients, totals = round_trip(grid.row, images, slice(0, panel.size), visit)
    loss, scale_gradient, bias_gradient = totals.unbind()
    return BlockGradients(loss, image_gradients, sums.of_own_texts(), scale_gradient, bias_gradient)


def grid_value(images: Embeddings, texts: Embeddings, pairs: Pairs, grid: Grid) -> Tensor:
    """The loss of `grid_gradients` alone.  # all ranks of the grid"""
    panel = _Panel(texts, grid.column)

    def visit(guest: Embeddings, rows: slice, is_home: bool) -> list[Tensor]:  # noqa: FBT001
        loss = guest.vectors.new_zeros(1, dtype=torch.float64)
        for piece in panel.pieces(rows, block_by_block=False):
            positives = panel.positives(piece, is_home=is_home)
            loss += value_of(guest, panel.texts.rows(piece), pairs, positives=positives)
        return [loss]

    (loss,) = round_trip(grid.row, images, slice(0, panel.size), visit)
    return loss.reshape(())


class _Panel:
    """The texts of a column, this rank's first, the others in the order of their arrival."""

    def __init__(self, texts: Embeddings, column: Ring | None) -> None:
        self.rows = len(texts.vectors)
        self.blocks = 1 if column is None else column.size
        self.size = self.blocks * self.rows
        self.texts = texts if column is None else texts.new_empty(self.size)
        self._there = self.rows
        self._arrivals: Iterator[Embeddings] = iter(())
        if column is not None:
            own, *others = (self.texts.rows(self.block(number)) for number in range(self.blocks))
            for kept, given in zip(own.tensors, texts.tensors, strict=True):
                kept.copy_(given)
            self._arrivals = iter(BlockStream(column, own, others))

    def block(self, number: int) -> slice:
        return slice(number * self.rows, (number + 1) * self.rows)

    def pieces(self, rows: slice, *, block_by_block: bool) -> Iterator[slice]:
        """Rows of the panel: what is there at once, what is on its way as it comes."""
        start = rows.start
        while start < rows.stop:
            if start >= self._there:
                next(self._arrivals)
                self._there += self.rows
            border = (start // self.rows + 1) * self.rows if block_by_block else self._there
            stop = min(rows.stop, border)
            yield slice(start, stop)
            start = stop

    def positives(self, piece: slice, *, is_home: bool) -> int | None:
        """Where the match of a visitor's first image is among these rows."""
        return -piece.start if is_home and piece.start < self.rows else None


class _PanelGradients:
    """Gradients of the texts of a panel, summed over the images of the row; complete ones go along the column."""

    def __init__(self, panel: _Panel, pairs: Pairs, grid: Grid) -> None:
        self.gradients = pairs.zeros(panel.texts.vectors)
        self._panel = panel
        self._stream = None if grid.column is None else GradientStream(grid.column, grid.row.gradient_dtype)
        self._sent = 0

    def pass_on_complete(self, rows: int) -> None:
        """Send the next block home if it lies within the first `rows` rows, which are complete."""
        following = self._panel.block(self._sent + 1)
        if self._stream is not None and following.stop <= rows:
            self._sent += 1
            self._stream.pass_on([self.gradients[following]])

    def of_own_texts(self) -> Tensor:
        """Send the rest, and return the sum over the column for this rank's texts."""
        while self._sent < self._panel.blocks - 1:
            self.pass_on_complete(self._panel.size)
        own = self.gradients[self._panel.block(0)]
        return own if self._stream is None else self._stream.added_to([own])[0]
