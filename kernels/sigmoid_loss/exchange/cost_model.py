"""How long each way to bring texts to images takes, from sizes and links; and which one is chosen. Pure arithmetic.

The terms follow the code: a hop is hidden by the block that is computed meanwhile, or is waited for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Literal, NamedTuple

Form = Literal["ring", "node_ring", "grid", "all_gather"]

# memory that a form may take to save time, for texts and their gradients of more than one rank
PANEL_BYTES = 2**30
# a form further down the list must save this share of the time
MARGIN = 0.05


@dataclass(frozen=True)
class Links:
    """Speeds of one rank. inside, between: bytes a second to another rank of its node, or of another node.

    latency: seconds from posting a message to its arrival, its length apart. flops: of the products of a block.
    call: seconds that a block costs whatever its size.

    The defaults are an H200's in bf16, with NVLink and one 400 Gb/s adapter a rank. `call` is an assumption, the
    others are data sheet values or were measured elsewhere.
    """

    inside: float = 450e9
    between: float = 50e9
    inside_latency: float = 3e-6
    between_latency: float = 8e-6
    flops: float = 780e12
    call: float = 50e-6


# gloo over one machine's memory, with one core a rank
CPU_LINKS = Links(1e9, 1e9, 2e-4, 2e-4, 5e10, 1e-4)
# fp32: six products of bf16, and two without matrix units
FP32_FLOPS = 60e12


class Sizes(NamedTuple):
    """What is exchanged: rows a rank, width E, bytes of an element of texts and of gradients, bytes of an id (or 0)."""

    ranks: int
    ranks_per_node: int
    rows: int
    width: int
    element: int
    gradient_element: int
    id_bytes: int = 0

    @property
    def block(self) -> int:
        """Bytes of a block of texts on its way."""
        return self.rows * (self.width * self.element + self.id_bytes)

    @property
    def gradients(self) -> int:
        """Bytes of its gradients on their way."""
        return self.rows * self.width * self.gradient_element


class Plan(NamedTuple):
    """A form, and the number of rows where it is a grid."""

    form: Form
    grid_rows: int = 0


class _Ring(NamedTuple):
    size: int
    bandwidth: float
    latency: float


# what an image takes home on a grid beside its gradient: loss, gradients of scale and bias in float64
_TOTALS = 3 * 8


def plans(sizes: Sizes) -> list[Plan]:
    """All that these ranks can do, those that take the least memory first."""
    forms = [Plan("ring")]
    if _fills_nodes(sizes.ranks, sizes):
        forms.append(Plan("node_ring"))
    grids = [Plan("grid", rows) for rows in range(2, sizes.ranks) if sizes.ranks % rows == 0]
    return [*forms, *grids, Plan("all_gather")]


def choose(sizes: Sizes, links: Links) -> Plan:
    """The first in the order of `plans` that takes at most 5 per cent longer than the fastest.

    Those whose panel of texts and gradients passes PANEL_BYTES are left out.
    """
    times = {
        plan: seconds(plan, sizes, links) for plan in plans(sizes) if panel_bytes(plan, sizes) <= PANEL_BYTES
    }
    limit = (1 + MARGIN) * min(times.values())
    return next(plan for plan, time in times.items() if time <= limit)


def panel_bytes(plan: Plan, sizes: Sizes) -> int:
    """Memory that grows with the number of ranks: texts, their gradients, and these once more while they are summed."""
    blocks = {"grid": plan.grid_rows, "all_gather": sizes.ranks}.get(plan.form, 0)
    return blocks * (sizes.block + 2 * sizes.gradients)


def seconds(plan: Plan, sizes: Sizes, links: Links) -> float:
    """Time of the loss with its gradients."""
    if plan.form == "all_gather":
        return _gather_seconds(sizes, links)
    column = plan.grid_rows or 1
    texts = column * sizes.rows
    hop = sizes.block, sizes.gradients + _TOTALS * (plan.form == "grid")

    def work(share: float) -> float:
        return _block_seconds(sizes, links, share * texts)

    time = _trip_seconds(_rings(plan, sizes, links), hop, work, 1.0)
    if column == 1:
        return time
    ring = _Ring(column, *_link(sizes.ranks, links, sizes))
    # gathered behind the first half of the work at home, sent back behind the last, both block by block
    hidden = work(0.5)
    time += 1.5 * (column - 1) * links.call
    return time + sum(
        max(0.0, (column - 1) * _hop_seconds(ring, part) - hidden) for part in (sizes.block, sizes.gradients)
    )


def bytes_sent(plan: Plan, sizes: Sizes) -> int:
    """Bytes that a rank sends for the loss with its gradients. An all-gather is counted as one round a ring."""
    both = sizes.block + sizes.gradients
    if plan.form == "all_gather":
        return (sizes.ranks - 1) * both
    hops = _hops([ring.size for ring in _rings(plan, sizes, Links())])
    if plan.form != "grid":
        return sum(hops) * both
    return sum(hops) * (both + _TOTALS) + (plan.grid_rows - 1) * both


def _hops(ring_sizes: list[int]) -> list[int]:
    """Messages of each ring, the outermost first: the visit at home, and so its inner trip, is made in two halves."""
    if not ring_sizes:
        return []
    size, *inner = ring_sizes
    return [size - 1, *((size + 1) * hops for hops in _hops(inner))]


def _rings(plan: Plan, sizes: Sizes, links: Links) -> list[_Ring]:
    """The rings that a block goes round, the outermost first."""
    size = sizes.ranks // (plan.grid_rows or 1)
    if size == 1:
        return []
    if plan.form in ("node_ring", "grid") and _fills_nodes(size, sizes):
        inside = _Ring(sizes.ranks_per_node, links.inside, links.inside_latency)
        return [_Ring(size // sizes.ranks_per_node, links.between, links.between_latency), inside]
    bandwidth, latency = _link(size, links, sizes)
    return [_Ring(size, bandwidth, latency)]


def _fills_nodes(size: int, sizes: Sizes) -> bool:
    return 1 < sizes.ranks_per_node < size and size % sizes.ranks_per_node == 0


def _link(span: int, links: Links, sizes: Sizes) -> tuple[float, float]:
    """The slowest link of a ring among so many consecutive ranks."""
    is_inside = span <= sizes.ranks_per_node and sizes.ranks_per_node % span == 0
    if is_inside:
        return links.inside, links.inside_latency
    return links.between, links.between_latency


def _block_seconds(sizes: Sizes, links: Links, texts: float) -> float:
    return links.call + 6 * sizes.rows * texts * sizes.width / links.flops


def _hop_seconds(ring: _Ring, size: int) -> float:
    return size / ring.bandwidth + ring.latency


def _trip_seconds(
    rings: list[_Ring], hop: tuple[int, int], work: Callable[[float], float], share: float
) -> float:
    """`round_trip` of route.py: visits in place of the work that they do."""
    if not rings:
        return work(share)
    ring, *inner = rings
    block, gradients = (_hop_seconds(ring, size) for size in hop)
    half, whole = (_trip_seconds(inner, hop, work, part) for part in (share / 2, share))
    # the first visitor comes before any gradient is on its way, and with the last no further block is
    rounds = [whole] if ring.size == 2 else [max(whole, block), max(whole, gradients)]
    between = (ring.size - 3) * max(whole, block + gradients) if ring.size > 3 else 0.0
    return max(half, block) + sum(rounds) + between + max(half, gradients)


def _gather_seconds(sizes: Sizes, links: Links) -> float:
    """All-gather, one block, reduce-scatter: within and between nodes at once, each of the speed of its links."""
    both = sizes.block + sizes.gradients
    inside = min(sizes.ranks, sizes.ranks_per_node)
    nodes = sizes.ranks / inside
    wire = max((nodes - 1) * both / links.between, (inside - 1) * nodes * both / links.inside)
    latency = links.between_latency if nodes > 1 else links.inside_latency
    return wire + 2 * log2(sizes.ranks) * latency + _block_seconds(sizes, links, sizes.ranks * sizes.rows)
