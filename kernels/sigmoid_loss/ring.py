"""The loss over the texts of all ranks: blocks of texts travel round a ring together with their gradient.

Each logit is computed once, on the rank that has its image. Text block k + 1 travels while block k is computed on;
the gradient follows one hop behind and comes home complete. Memory does not grow with the number of ranks.
"""

import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.sigmoid_loss.block import BlockGradients, sigmoid_loss_block, sigmoid_loss_block_value
from kernels.sigmoid_loss.pair_ids import PairIds

# gloo matches messages between two ranks by tag, NCCL by order; the order is the same on both ends too
_TEXTS, _GRADIENTS, _IDS = 1, 2, 3
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ring_gradients(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    group: dist.ProcessGroup,
    ids: PairIds | None = None,
) -> BlockGradients:
    """Sums over this rank's `[n, E]` images and all texts.  # all ranks of group, with equal shapes

    The gradients of images, scale and bias are of this rank's loss; that of its texts is of the sum over ranks.
    """
    ring, half = _Ring(group), len(images) // 2
    travel = _TextTravel(ring, texts, ids)
    # the block at home is halved: its first half hides the first hop of texts, its second the last of gradients
    home = sigmoid_loss_block(images[:half], texts, scale, bias, positives=0, ids=_rows(ids, slice(half)))
    image_gradients, arriving = home.images.new_zeros(images.shape), torch.empty_like(home.texts)
    image_gradients[:half] += home.images
    totals, homeward = _totals(home), None
    for guest, guest_ids in travel:
        block = sigmoid_loss_block(images, guest, scale, bias, positives=None, ids=guest_ids)
        image_gradients += block.images
        totals += _totals(block)
        if homeward is not None:
            block.texts.add_(homeward.wait())
        homeward = ring.start(block.texts, arriving, tag=_GRADIENTS)
    rest = sigmoid_loss_block(
        images[half:], texts, scale, bias, positives=half, ids=_rows(ids, slice(half, None))
    )
    image_gradients[half:] += rest.images
    totals += _totals(rest)
    assert homeward is not None, "a ring has at least two ranks"
    text_gradients = home.texts.add_(rest.texts).add_(homeward.wait())
    loss, scale_gradient, bias_gradient = totals.unbind()
    return BlockGradients(loss, image_gradients, text_gradients, scale_gradient, bias_gradient)


def _rows(ids: PairIds | None, rows: slice) -> PairIds | None:
    return None if ids is None else ids._replace(images=ids.images[rows])


def _totals(block: BlockGradients) -> Tensor:
    return torch.stack([block.loss, block.scale, block.bias])


def ring_value(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    group: dist.ProcessGroup,
    ids: PairIds | None = None,
) -> Tensor:
    """The loss of `ring_gradients` alone: only texts travel.  # all ranks of group, with equal shapes"""
    travel = _TextTravel(_Ring(group), texts, ids)
    loss = sigmoid_loss_block_value(images, texts, scale, bias, positives=0, ids=ids)
    for guest, guest_ids in travel:
        loss += sigmoid_loss_block_value(images, guest, scale, bias, positives=None, ids=guest_ids)
    return loss


def check_equal_on_ranks(
    images: Tensor, group: dist.ProcessGroup, *, gradients: bool, ids: PairIds | None = None
) -> None:
    """Raise ValueError on all ranks if their embeddings differ in shape or dtype.  # all ranks of group

    Unequal messages would hang or corrupt the ring. One all-reduce of a few integers in each call: a rank that has
    seen its shape before could not know that another has a new one.
    """
    if dist.get_rank(group) < 0:
        raise ValueError("sigmoid_loss: this rank is not a member of the group it was given")
    # -1 for no ids; the bits of a double that is not negative, as an integer, are not negative either
    weight = -1 if ids is None else struct.unpack("q", struct.pack("d", ids.weight))[0]
    mine = [*images.shape, _DTYPES.index(images.dtype), int(gradients), weight]
    highest = _maximum([*mine, *(-value for value in mine)], images.device, group)
    lowest = [-value for value in highest[len(mine) :]]
    names = "number of rows", "width", "dtype", "use of gradients", "pair ids or same_id_weight"
    unequal = [name for name, low, high in zip(names, lowest, highest, strict=False) if low != high]
    if unequal:
        raise ValueError(
            f"sigmoid_loss: the ranks of a group must have equal batches, but differ in {' and '.join(unequal)}; "
            f"rows from {lowest[0]} to {highest[0]}, on this rank {tuple(images.shape)} {images.dtype}. Drop the "
            "incomplete last batch, and call the loss alike on every rank"
        )


def exchange_seconds() -> float:
    """Seconds this process has waited for the ring since the last call, and start again at 0.

    On a CPU: time on the host's clock. On a GPU: time the compute stream stood still, measured by events; reading
    waits for the work launched so far.
    """
    return _clock.read()


def _maximum(values: list[int], device: torch.device, group: dist.ProcessGroup) -> list[int]:
    if device.type != "cuda":
        reduced = torch.tensor(values)
        with _clock.waiting(device):
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group)
        return reduced.tolist()
    # on a stream of its own, so that the host does not wait for the towers' kernels as well
    with torch.cuda.stream(torch.cuda.Stream(device)):
        reduced = torch.tensor(values, device=device)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group)
        return reduced.tolist()


class _Exchange(NamedTuple):
    """A message on its way out and one on its way in."""

    works: list[dist.Work]
    outgoing: Tensor  # held, as it must not be freed or written to before `wait`
    incoming: Tensor

    def wait(self) -> Tensor:
        with _clock.waiting(self.incoming.device):
            for work in self.works:
                work.wait()
        return self.incoming


class _Ring:
    """This rank's neighbours: messages go to the right and come from the left."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        self.right = dist.get_global_rank(group, (rank + 1) % self.size)
        self.left = dist.get_global_rank(group, (rank - 1) % self.size)

    def start(self, outgoing: Tensor, incoming: Tensor, *, tag: int) -> _Exchange:
        # both in one call: NCCL hangs where sends and receives are not grouped alike on all ranks
        operations = [
            dist.P2POp(dist.isend, outgoing, self.right, group=self.group, tag=tag),
            dist.P2POp(dist.irecv, incoming, self.left, group=self.group, tag=tag),
        ]
        return _Exchange(dist.batch_isend_irecv(operations), outgoing, incoming)


class _Travel:
    """Yields a tensor of the other ranks; the next is on its way before one is given out."""

    def __init__(self, ring: _Ring, own: Tensor, *, tag: int) -> None:
        self._ring, self._tag = ring, tag
        self._hops = ring.size - 1
        self._buffers = [torch.empty_like(own) for _ in range(min(2, self._hops))]
        self._exchange = ring.start(own, self._buffers[0], tag=tag)

    def __iter__(self) -> Iterator[Tensor]:
        for hop in range(1, self._hops + 1):
            guest = self._exchange.wait()
            if hop < self._hops:
                # the buffer written to was sent on and computed on in the last round
                self._exchange = self._ring.start(guest, self._buffers[hop % 2], tag=self._tag)
            yield guest


class _TextTravel:
    """Yields the texts of the other ranks and, where there are ids, those of the pairs they make with ours."""

    def __init__(self, ring: _Ring, texts: Tensor, ids: PairIds | None) -> None:
        self._ids = ids
        self._texts = _Travel(ring, texts, tag=_TEXTS)
        self._text_ids = None if ids is None else _Travel(ring, ids.texts, tag=_IDS)

    def __iter__(self) -> Iterator[tuple[Tensor, PairIds | None]]:
        if self._ids is None or self._text_ids is None:
            yield from ((texts, None) for texts in self._texts)
            return
        for texts, text_ids in zip(self._texts, self._text_ids, strict=True):
            yield texts, self._ids._replace(texts=text_ids)


class _WaitClock:
    """Adds up time spent waiting, on the host or on a GPU's compute stream."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._events.append((before, after))
        self._count_finished()

    def read(self) -> float:
        if self._events:
            self._events[-1][1].synchronize()
        self._count_finished()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count_finished(self) -> None:
        # keeps the queue short where nobody reads the clock
        while self._events and self._events[0][1].query():
            before, after = self._events.popleft()
            self._seconds += before.elapsed_time(after) / 1000


_clock = _WaitClock()
