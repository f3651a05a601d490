"""How the texts of a run's ranks meet each other's images: what a config names, whether it fits, and what was chosen.

The blocks that travel, and the pairs computed meanwhile, are in `kernels/sigmoid_loss/exchange`:
`kernels.sigmoid_loss(group=...)` works without this package.
"""

import logging
import re
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.products import dtype_of_products
from kernels.sigmoid_loss import Exchange, check_exchange, choose_exchange, exchange_seconds
from kernels.sigmoid_loss.exchange.cost_model import Form
from kernels.sigmoid_loss.exchange.wait_clock import waiting

__all__ = ["Ring", "exchange_seconds", "parse_exchange", "waiting"]

log = logging.getLogger(__name__)

_PLAIN: dict[str, Form | Literal["auto"]] = {
    "auto": "auto",
    "ring": "ring",
    "node_ring": "node_ring",
    "all_gather": "all_gather",
}
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class Ring:
    """The group and the exchange over which `kernels.sigmoid_loss` meets the texts of a run's ranks.

    exchange: `auto` (the fastest by a cost model), `ring`, `node_ring` (`node_ring:8` with 8 ranks a node), `grid:4x2`
    (rows x columns of ranks) or `all_gather`; README of kernels/sigmoid_loss. dtype: `bf16` halves what is sent and
    rounds it. Raises ValueError for others, and for a form that does not fit the number of ranks, where there are
    several.
    """

    def __init__(self, exchange: str, dtype: str) -> None:
        self.exchange = parse_exchange(exchange, dtype)
        self._is_announced = False
        self._agreed: set[tuple[object, ...]] = set()
        if (group := _several_ranks()) is not None:
            check_exchange(self.exchange, group)

    def group(
        self, images: Tensor, *, has_ids: bool, compute_dtype: torch.dtype | None
    ) -> dist.ProcessGroup | None:
        """All ranks; None for a single process, which exchanges nothing. images: `[B, E]` of this rank.

        The first call on several ranks says in the log what is sent, and how.
        """
        group = _several_ranks()
        if group is not None and not self._is_announced:
            sent = images.detach().to(dtype_of_products(images, compute_dtype))
            chosen = choose_exchange(self.exchange, sent, group, has_ids=has_ids)
            log.info("exchange of texts between ranks: %s", chosen)
            self._is_announced = True
        return group

    def is_agreed(self, images: Tensor, *, has_ids: bool) -> bool:
        """Whether all ranks have found that they exchange alike: in an earlier call with such `[B, E]` images.

        They need not ask again, as the loader gives each rank equally many in every step, and all take the same steps.
        """
        call = (
            images.shape,
            images.dtype,
            torch.is_autocast_enabled(images.device.type),
            images.requires_grad,
        )
        is_known = (*call, has_ids) in self._agreed
        self._agreed.add((*call, has_ids))
        return is_known


def parse_exchange(name: str, dtype: str) -> Exchange:
    """The `Exchange` that a config's `exchange` and `exchange_dtype` name; ValueError for others."""
    if dtype not in _DTYPES:
        raise ValueError(f"exchange_dtype is {dtype!r}: choose fp32 or bf16")
    travels = _DTYPES[dtype]
    if name in _PLAIN:
        return Exchange(_PLAIN[name], dtype=travels)
    if found := re.fullmatch(r"node_ring:(\d+)", name):
        return Exchange("node_ring", ranks_per_node=int(found[1]), dtype=travels)
    if found := re.fullmatch(r"grid:(\d+)x(\d+)", name):
        return Exchange("grid", grid=(int(found[1]), int(found[2])), dtype=travels)
    raise ValueError(
        f"exchange is {name!r}: choose {', '.join(_PLAIN)}, node_ring:8 (ranks a node) or grid:4x2 (rows x columns of "
        "ranks)"
    )


def _several_ranks() -> dist.ProcessGroup | None:
    """The group of all ranks, where there is more than one."""
    group = dist.group.WORLD if dist.is_initialized() else None
    return group if group is not None and dist.get_world_size(group) > 1 else None
