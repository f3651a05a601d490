"""Whether all ranks of a group are about to exchange the same: asked before anything else is sent."""

import struct
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.sigmoid_loss.exchange.choose import Exchange, choose_exchange
from kernels.sigmoid_loss.exchange.cost_model import Form
from kernels.sigmoid_loss.exchange.wait_clock import waiting
from kernels.sigmoid_loss.pairs import PairIds

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPARED = (
    "number of rows", "width", "dtype", "use of gradients", "pair ids or same_id_weight", "exchange",
)  # fmt: skip


def agree(
    exchange: Exchange,
    images: Tensor,
    group: dist.ProcessGroup,
    *,
    gradients: bool,
    ids: PairIds | None = None,
    refusal: ValueError | None = None,
    is_agreed: bool = False,
) -> Exchange:
    """`choose_exchange`, and ValueError on all ranks if their embeddings or choices differ.  # all ranks of group

    Unequal messages would hang or corrupt the exchange. One small all-reduce in each call: a rank that has seen its
    shape before could not know that another has a new one. refusal: what is wrong with this rank's arguments, if
    anything; it is raised here, and the other ranks are told. is_agreed: the caller knows, and nobody asks.
    """
    if dist.get_rank(group) < 0:
        raise ValueError("sigmoid_loss: this rank is not a member of the group it was given")
    is_alone = dist.get_world_size(group) == 1
    if refusal is not None and (is_alone or is_agreed):
        raise refusal
    if is_alone:
        return exchange
    if is_agreed:
        return choose_exchange(exchange, images, group, has_ids=ids is not None)
    mine, chosen = dict.fromkeys(_COMPARED, -1), None
    if refusal is None:
        try:
            chosen = choose_exchange(exchange, images, group, has_ids=ids is not None)
            mine = _compared(images, chosen, ids, gradients=gradients)
        except ValueError as error:
            refusal = error
    values = [*mine.values(), int(refusal is not None)]
    highest = _maximum([*values, *(-value for value in values)], _device(images, group), group)
    lowest = [-value for value in highest[len(values) :]]
    if refusal is not None:
        raise refusal
    if highest[len(mine)]:
        raise ValueError(
            "sigmoid_loss: another rank of the group was given what it refuses; see its own message"
        )
    unequal = [name for name, low, high in zip(mine, lowest, highest, strict=False) if low != high]
    if unequal:
        hint = "drop the incomplete last batch, and " if unequal[0] == _COMPARED[0] else ""
        raise ValueError(
            f"sigmoid_loss: the ranks of a group must call it alike, but differ in {' and '.join(unequal)}; rows from"
            f" {lowest[0]} to {highest[0]}, on this rank {tuple(images.shape)} {images.dtype}: {hint}give every rank"
            " the same"
        )
    assert chosen is not None
    return chosen


def _compared(images: Tensor, exchange: Exchange, ids: PairIds | None, *, gradients: bool) -> dict[str, int]:
    # the bits of a double that is not negative, as an integer, are not negative either
    weight = -1 if ids is None else struct.unpack("q", struct.pack("d", ids.weight))[0]
    values = (
        len(images),
        images.shape[1],
        _DTYPES.index(images.dtype),
        int(gradients),
        weight,
        _code(exchange),
    )
    return dict(zip(_COMPARED, values, strict=True))


def _device(images: Tensor, group: dist.ProcessGroup) -> torch.device:
    # what this rank was given may be no tensor
    if isinstance(images, Tensor):
        return images.device
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


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
