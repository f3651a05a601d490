"""The rings that a block goes round: one through all ranks, or a ring of rings through the nodes and their ranks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.sigmoid_loss.exchange.messages import BlockStream, GradientStream, Ring
from kernels.sigmoid_loss.pairs import Embeddings


class Route(NamedTuple):
    """Rings that a block goes round, the outermost first, and the dtype in which its gradients travel (None: own)."""

    rings: tuple[Ring, ...]
    gradient_dtype: torch.dtype | None = None


def flat_route(group: dist.ProcessGroup, members: Sequence[int]) -> tuple[Ring, ...]:
    """One ring through all members; none where there is one member only."""
    return (Ring(group, members),) if len(members) > 1 else ()


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
    blocks, gradients = BlockStream(ring, block), GradientStream(ring, route.gradient_dtype)
    # the visit at home is halved: its first half hides the first hop of blocks, its second the last of gradients
    home = round_trip(within, block, slice(rows.start, middle), visit, own=own)
    for guest in blocks:
        gradients.pass_on(round_trip(within, guest, rows, visit, own=False))
    rest = round_trip(within, block, slice(middle, rows.stop), visit, own=own)
    return gradients.added_to([first.add_(second) for first, second in zip(home, rest, strict=True)])
