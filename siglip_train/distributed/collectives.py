"""Exchange of small values and of result rows between ranks: for logs, stop signals and evaluation.

Every function is collective: all ranks call it, in the same order. Without a process group each is a no-op.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_train.errors import UserError

Value = TypeVar("Value")


def is_distributed() -> bool:
    """True if there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait until every rank is here."""
    if not is_distributed():
        return
    if dist.get_backend() == "nccl":
        any_rank(flag=False)  # NCCL's own barrier guesses the device and warns
    else:
        dist.barrier()  # before the end of a process: unlike an all-reduce it leaves gloo's threads no tensor to free


def any_rank(flag: bool) -> bool:  # noqa: FBT001
    """Return True on every rank if `flag` is true on one. The host waits for one small all-reduce."""
    if not is_distributed():
        return flag
    # on a stream of its own, so that the host does not wait for what a GPU computes as well
    with _stream_of_its_own():
        raised = torch.tensor([int(flag)], device=_device())
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())


def broadcast_object(value: Value, source: int = 0) -> Value:
    """Return rank `source`'s value (anything that pickles) on every rank."""
    if not is_distributed():
        return value
    box: list[Any] = [value if dist.get_rank() == source else None]
    dist.broadcast_object_list(box, src=source, device=_device())
    return box[0]


def on_main(decide: Callable[[], Value]) -> Value:
    """Return on every rank what `decide` returns on rank 0; a `UserError` of it is raised on every rank."""
    value, failure = None, None
    if not is_distributed() or dist.get_rank() == 0:
        try:
            value = decide()
        except UserError as error:
            failure = str(error)
    value, failure = broadcast_object((value, failure))
    if failure is not None:
        raise UserError(failure)
    return value  # type: ignore[return-value]


def on_main_in_parts(work: Callable[[Callable[[], None]], Value], moved: Callable[[], None]) -> Value:
    """As `on_main`, for work that may take longer than ranks wait for one another.

    `work` calls the function that it is given after every part of it; `moved` is then called on all ranks.
    """

    def part() -> None:
        moved()
        broadcast_object("a part")

    def whole() -> Value:
        try:
            return work(part)
        finally:
            broadcast_object(None)

    if is_distributed() and dist.get_rank() > 0:
        while broadcast_object(None) is not None:
            moved()
    return on_main(whole)


def gather_objects(value: Value) -> list[Value]:
    """Return the value of each rank (anything that pickles), in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Add up what the ranks hold under each name; a name that a rank lacks counts 0 there."""
    return {name: float(sum(parts)) for name, parts in _by_name(values).items()}


def add_over_ranks(values: Tensor) -> Tensor:
    """Add up the tensors of all ranks, of one shape and dtype: the sum, the same to the last bit on every rank."""
    if not is_distributed():
        return values
    total = values.detach().to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Average what the ranks hold under each name, over the ranks that have it."""
    return {name: float(sum(parts) / len(parts)) for name, parts in _by_name(values).items()}


def max_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Return the largest value under each name."""
    return {name: float(max(parts)) for name, parts in _by_name(values).items()}


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the ranks' rows in rank order, on every rank: `[n_i, ...]` -> `[sum n_i, ...]`.

    The n_i may differ and may be 0; the result is on the device of `rows`, without gradient.
    Raises ValueError on all ranks if the rows differ in shape or dtype between ranks.
    """
    if not is_distributed():
        return rows.detach()
    kinds = gather_objects((len(rows), tuple(rows.shape[1:]), rows.dtype))
    if len({kind[1:] for kind in kinds}) > 1:
        raise ValueError(f"gather_rows needs rows of one shape and dtype; by rank they are {kinds}")
    counts = [kind[0] for kind in kinds]
    # collectives want equal shapes: every rank sends as many rows as the largest has
    padded = rows.new_zeros((max(counts), *rows.shape[1:]), device=_device())
    padded[: len(rows)] = rows.detach()
    received = [torch.empty_like(padded) for _ in counts]
    if padded.numel():
        dist.all_gather(received, padded)
    parts = [part[:count] for part, count in zip(received, counts, strict=True)]
    return torch.cat(parts).to(rows.device)


def _by_name(values: Mapping[str, float]) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = {}
    for held in gather_objects(dict(values)):
        for name, value in held.items():
            parts.setdefault(name, []).append(float(value))
    return parts


def _stream_of_its_own() -> AbstractContextManager[Any]:
    return torch.cuda.stream(torch.cuda.Stream()) if dist.get_backend() == "nccl" else nullcontext()


def _device() -> torch.device:
    """Where the backend wants its tensors; `init_world` has made this rank's GPU the current one."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )
