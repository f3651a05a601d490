"""The loss over the texts of all ranks: blocks of texts travel round a ring together with their gradient.

Each logit is computed once, on the rank that has its image. Text block k + 1 travels while block k is computed on;
the gradient follows one hop behind and comes home complete. Memory does not grow with the number of ranks. On several
nodes it is a ring of rings: a block that comes from another node goes round its new node before it leaves it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.sigmoid_loss.block import BlockGradients
from kernels.sigmoid_loss.messages import Followers, Ring, Travel
from kernels.sigmoid_loss.pairs import Embeddings, Pairs, gradients_of, totals_of, value_of


class Route(NamedTuple):
    """Rings that a block goes round, the outermost first, and the dtype in which its gradients travel (None: own)."""

    rings: tuple[Ring, ...]
    gradient_dtype: torch.dtype | None = None


def flat_route(group: dist.ProcessGroup, members: Sequence[int]) -> tuple[Ring, ...]:
    """One ring through all members; none where there is one member only."""
    return (Ring(group, members),) if len(members) > 1 else ()


def two_way_route(group: dist.ProcessGroup, members: Sequence[int]) -> tuple[Ring, ...]:
    """One ring, on which half of each block goes one way and half the other."""
    return (Ring(group, members, lanes=2),) if len(members) > 1 else ()


def node_route(group: dist.ProcessGroup, members: Sequence[int], ranks_per_node: int) -> tuple[Ring, ...]:
    """A ring through the ranks of equal place on each node, and within it one through the ranks of a node.

    members are ordered by node. A flat ring where they fill no node, or one node only.
    """
    if ranks_per_node == 1 or len(members) <= ranks_per_node or len(members) % ranks_per_node:
        return flat_route(group, members)
    node, local = divmod(members.index(dist.get_rank(group)), ranks_per_node)
    inner = Ring(group, members[node * ranks_per_node : (node + 1) * ranks_per_node])
    return Ring(group, members[local::ranks_per_node], carrier=inner), inner


# (visiting block, rows of what stays, whether the visitor is at home) -> tensors that follow the visitor
Visit = Callable[[Embeddings, slice, bool], list[Tensor]]


def round_trip(
    route: Route, block: Embeddings, rows: slice, visit: Visit, *, own: bool = True
) -> list[Tensor]:
    """Take this rank's block to all ranks and theirs to this one; call `visit` for each.  # all ranks of the route

    Returns, summed over all ranks, what their visits gave for this rank's block; these tensors are new.
    """
    if not route.rings:
        return visit(block, rows, own)
    (ring, *inner), middle = route.rings, (rows.start + rows.stop) // 2
    within = route._replace(rings=tuple(inner))
    travel, followers = Travel(ring, block), Followers(ring, route.gradient_dtype)
    # the visit at home is halved: its first half hides the first hop of blocks, its second the last of gradients
    home = round_trip(within, block, slice(rows.start, middle), visit, own=own)
    for guest in travel:
        followers.pass_on(round_trip(within, guest, rows, visit, own=False))
    rest = round_trip(within, block, slice(middle, rows.stop), visit, own=own)
    return followers.added_to([first.add_(second) for first, second in zip(home, rest, strict=True)])


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
