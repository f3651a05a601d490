"""How texts meet images between ranks: what a user may ask for, and what is chosen."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from math import prod
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.sigmoid_loss.exchange.cost_model import CPU_LINKS, FP32_FLOPS, Form, Links, Sizes, choose

_choose = lru_cache(maxsize=256)(choose)


@dataclass(frozen=True)
class Exchange:
    """How texts meet images between ranks; README, "Exchange between ranks", says when which is best.

    form: "auto" takes what the cost model finds fastest. ranks_per_node: consecutive ranks of the group that share a
    node; None = read LOCAL_WORLD_SIZE, as torchrun sets it. grid: rows and columns of ranks, of form "grid" only.
    dtype: bfloat16 rounds once what travels, at home as elsewhere, and gradients at every hop; None = embeddings as
    they are, gradients in float32 or better. links: speeds for "auto"; None = those of an H200, or of a CPU.

    Raises ValueError for values that do not fit together.
    """

    form: Form | Literal["auto"] = "auto"
    ranks_per_node: int | None = None
    grid: tuple[int, int] | None = None
    dtype: torch.dtype | None = None
    links: Links | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without knowing the ranks."""
        forms = ("auto", *get_args(Form))
        if self.form not in forms:
            raise ValueError(f"sigmoid_loss: exchange form {self.form!r} is not one of {', '.join(forms)}")
        if (self.grid is not None) != (self.form == "grid"):
            raise ValueError(
                f"sigmoid_loss: grid={self.grid} with form={self.form!r}: a grid needs its rows and columns, "
                "and nothing else has them"
            )
        if self.dtype not in (None, torch.bfloat16):
            raise ValueError(f"sigmoid_loss: the exchange dtype must be None or bfloat16, not {self.dtype}")
        numbers = [1 if self.ranks_per_node is None else self.ranks_per_node]
        numbers += (1, 1) if self.grid is None else self.grid
        if len(numbers) != 3 or not all(isinstance(number, int) and number >= 1 for number in numbers):
            raise ValueError(
                f"sigmoid_loss: ranks_per_node={self.ranks_per_node} and both numbers of grid={self.grid} must be "
                "integers of at least 1"
            )
        if not isinstance(self.links, Links | None):
            raise ValueError(f"sigmoid_loss: links must be Links; got {self.links!r}")

    def __str__(self) -> str:
        """The form as a config names it, for a log."""
        detail = {"node_ring": f":{self.ranks_per_node}", "grid": ":{}x{}".format(*self.grid or (0, 0))}
        return f"{self.form}{detail.get(self.form, '')}{'' if self.dtype is None else ' in bf16'}"


AUTO = Exchange()


def choose_exchange(
    exchange: Exchange, embeddings: Tensor, group: dist.ProcessGroup, *, has_ids: bool = False
) -> Exchange:
    """What `exchange` comes to for `[n, E]` embeddings on a group: a form, not "auto", and ranks_per_node.

    embeddings: in the dtype of the products, which is what travels.

    Raises ValueError as `check_exchange`.
    """
    ranks, per_node = dist.get_world_size(group), check_exchange(exchange, group)
    exchange = replace(exchange, ranks_per_node=per_node)
    if exchange.form != "auto":
        return exchange
    element = narrowed(embeddings.element_size(), exchange.dtype)
    accumulated = narrowed(max(4, embeddings.element_size()), exchange.dtype)
    rows, width = embeddings.shape
    sizes = Sizes(ranks, per_node, rows, width, element, accumulated, 8 * has_ids)
    plan = _choose(sizes, exchange.links or _links_of(embeddings))
    grid = (plan.grid_rows, ranks // plan.grid_rows) if plan.grid_rows else None
    return replace(exchange, form=plan.form, grid=grid)


def check_exchange(exchange: Exchange, group: dist.ProcessGroup) -> int:
    """Return the ranks on a node that it comes to; ValueError where it does not fit the ranks of the group."""
    ranks = dist.get_world_size(group)
    goes_by_nodes = exchange.form in ("auto", "node_ring", "grid")
    per_node = exchange.ranks_per_node or (ranks_on_a_node(group) if goes_by_nodes else 1)
    if ranks % per_node and exchange.form == "node_ring":
        raise ValueError(
            f"sigmoid_loss: {per_node} ranks a node do not divide the {ranks} ranks of the group"
        )
    if exchange.grid is not None and prod(exchange.grid) != ranks:
        rows, columns = exchange.grid
        raise ValueError(
            f"sigmoid_loss: a grid of {rows} x {columns} has {rows * columns} ranks, the group has {ranks}"
        )
    return min(per_node, ranks)


def ranks_on_a_node(group: dist.ProcessGroup) -> int:
    """Consecutive ranks of the group that share a node, by LOCAL_WORLD_SIZE; without it, all of them are thought to.

    1 where the nodes have unequal shares of the group. Raises ValueError where it does not divide the world.
    """
    world, text = dist.get_world_size(), os.environ.get("LOCAL_WORLD_SIZE", "")
    local = int(text) if text.isdigit() else world
    if local < 1 or world % local:
        raise ValueError(
            f"sigmoid_loss: LOCAL_WORLD_SIZE={text} does not divide the {world} ranks of the world; correct it, or "
            "choose an exchange that does not go by nodes: ring or all_gather"
        )
    return _equal_runs([rank // local for rank in dist.get_process_group_ranks(group)])


def _equal_runs(nodes: Sequence[int]) -> int:
    runs = [(node, len(list(ranks))) for node, ranks in groupby(nodes)]
    lengths = {length for _, length in runs}
    is_even = len(lengths) == 1 and len({node for node, _ in runs}) == len(runs)
    return lengths.pop() if is_even else 1


def narrowed(size: int, dtype: torch.dtype | None) -> int:
    """Bytes of an element on its way, of `size` bytes at home."""
    return size if dtype is None else min(size, dtype.itemsize)


def _links_of(embeddings: Tensor) -> Links:
    if not embeddings.is_cuda:
        return CPU_LINKS
    return Links() if embeddings.element_size() == 2 else Links(flops=FP32_FLOPS)
