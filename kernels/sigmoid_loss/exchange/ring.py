"""The loss over the texts of all ranks: blocks of texts travel round a ring together with their gradient.

Each logit is computed once, on the rank that has its image. Text block k + 1 travels while block k is computed on;
the gradient follows one hop behind and comes home complete. Memory does not grow with the number of ranks. On several
nodes it is a ring of rings: a block that comes from another node goes round its new node before it leaves it.
"""

import torch
from torch import Tensor

from kernels.sigmoid_loss.block import gradients_of, value_of
from kernels.sigmoid_loss.exchange.route import Route, round_trip
from kernels.sigmoid_loss.pairs import BlockGradients, Embeddings, Pairs, totals_of


def ring_gradients(images: Embeddings, texts: Embeddings, pairs: Pairs, route: Route) -> BlockGradients:
    """Sums over this rank's `[n, E]` images and all texts.  # all ranks of the route, with equal shapes

    The gradients of images, scale and bias are of this rank's loss; that of its texts is of the sum over ranks.
    """
    image_gradients = pairs.zeros(images.vectors)
    totals = image_gradients.new_zeros(3, dtype=torch.float64)

    def visit(guest: Embeddings, rows: slice, is_home: bool) -> list[Tensor]:  # noqa: FBT001
        block = gradients_of(images.rows(rows), guest, pairs, positives=rows.start if is_home else None)
        image_gradients[rows] += block.images
        totals.add_(totals_of(block))
        return [block.texts]

    (text_gradients,) = round_trip(route, texts, slice(0, len(images.vectors)), visit)
    loss, scale_gradient, bias_gradient = totals.unbind()
    return BlockGradients(loss, image_gradients, text_gradients, scale_gradient, bias_gradient)


def ring_value(images: Embeddings, texts: Embeddings, pairs: Pairs, route: Route) -> Tensor:
    """The loss of `ring_gradients` alone: only texts travel.  # all ranks of the route, with equal shapes"""
    loss = images.vectors.new_zeros((), dtype=torch.float64)

    def visit(guest: Embeddings, rows: slice, is_home: bool) -> list[Tensor]:  # noqa: FBT001
        loss.add_(value_of(images.rows(rows), guest, pairs, positives=rows.start if is_home else None))
        return []

    round_trip(route, texts, slice(0, len(images.vectors)), visit)
    return loss
