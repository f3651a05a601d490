"""Whether all ranks of a group are about to exchange the same: asked before anything else is sent."""

import struct
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.sigmoid_loss.cost_model import Form
from kernels.sigmoid_loss.exchange import Exchange, choose_exchange
from kernels.sigmoid_loss.messages import waiting
from kernels.sigmoid_loss.pair_ids import PairIds

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def agree(
    exchange: Exchange,
    images: Tensor,
    group: dist.ProcessGroup,
    *,
    gradients: bool,
    ids: PairIds | None = None,
) -> Exchange:
    """`choose_exchange`, and ValueError on all ranks if their embeddings or choices differ.  # all ranks of group

    Unequal messages would hang or corrupt the exchange. One small all-reduce in each call: a rank that has seen its
    shape before could not know that another has a new one.
    """
    if dist.get_rank(group) < 0:
        raise ValueError("sigmoid_loss: this rank is not a member of the group it was given")
    if dist.get_world_size(group) == 1:
        return exchange
    refusal, chosen = None, None
    try:
        chosen = choose_exchange(exchange, images, group, has_ids=ids is not None)
    except ValueError as error:
        refusal = error  # told after the others have heard of it
    mine = {
        "number of rows": len(images),
        "width": images.shape[1],
        "dtype": _DTYPES.index(images.dtype),
        "use of gradients": int(gradients),
        # the bits of a double that is not negative, as an integer, are not negative either
        "pair ids or same_id_weight": -1
        if ids is None
        else struct.unpack("q", struct.pack("d", ids.weight))[0],
        "exchange": -1 if chosen is None else _code(chosen),
    }
    values = list(mine.values())
    highest = _maximum([*values, *(-value for value in values)], images.device, group)
    lowest = [-value for value in highest[len(values) :]]
    unequal = [name for name, low, high in zip(mine, lowest, highest, strict=False) if low != high]
    if refusal is not None:
        raise refusal
    if unequal:
        raise ValueError(
            f"sigmoid_loss: the ranks of a group must have equal batches, but differ in {' and '.join(unequal)}; "
            f"rows from {lowest[0]} to {highest[0]}, on this rank {tuple(images.shape)} {images.dtype}. Drop the "
            "incomplete last batch, and call the loss alike on every rank"
        )
    assert chosen is not None
    return chosen


def _code(exchange: Exchange) -> int:
    """A number that says what is sent where."""
    form = get_args(Form).index(exchange.form)
    rows, per_node = (exchange.grid or (0, 0))[0], exchange.ranks_per_node or 0
    return ((rows << 20 | per_node) << 3 | form) << 1 | (exchange.dtype is not None)


def _maximum(values: list[int], device: torch.device, group: dist.ProcessGroup) -> list[int]:
    if device.type != "cuda":
        reduced = torch.tensor(values)
        with waiting(device):
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group)
        return reduced.tolist()
    # on a stream of its own, so that the host does not wait for the towers' kernels as well
    with torch.cuda.stream(torch.cuda.Stream(device)):
        reduced = torch.tensor(values, device=device)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group)
        return reduced.tolist()
