"""Messages between ranks: neighbours on a ring, transfers on their way, and blocks that travel.

Only `batch_isend_irecv` on the group of the caller. Every rank posts the same messages in the same order: gloo matches
them by tag and order, NCCL by order alone.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.sigmoid_loss.exchange.wait_clock import waiting
from kernels.sigmoid_loss.pairs import Embeddings

BLOCKS, GRADIENTS = 1, 2


class Transfer:
    """Tensors on their way out and others on their way in. Neither may be written to or read before `wait`."""

    def __init__(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], carrier: "Ring") -> None:
        self.works: list[dist.Work] = []
        self._outgoing, self._incoming = outgoing, incoming
        self._carrier = carrier

    def wait(self) -> Sequence[Tensor]:
        """Return what has come in; on a GPU, the compute stream waits and the host does not."""
        self._carrier.unload(self)
        if self.works:
            with waiting(self._incoming[0].device):
                for work in self.works:
                    work.wait()
        return self._incoming


class Ring:
    """This rank's place on a ring through some ranks of a group: messages go to the right and come from the left.

    members: their ranks in `group`, this one among them. carrier: a ring of faster links, with whose messages the
    pieces of ours are sent in one batch: NCCL runs the batches of a group one after another, and both kinds of link are
    to be busy.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        members: Sequence[int],
        *,
        carrier: "Ring | None" = None,
    ) -> None:
        self.size = len(members)
        self.place = members.index(dist.get_rank(group))
        self._group = group
        self._right, self._left = (
            dist.get_global_rank(group, members[(self.place + step) % self.size]) for step in (1, -1)
        )
        self._carrier = carrier
        self._cargo: deque[tuple[list[dist.P2POp], Transfer]] = deque()

    def start(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, tag: int) -> Transfer:
        """Send tensors and receive as many of the same shapes.  # all members"""
        transfer = Transfer(outgoing, incoming, self._carrier or self)
        if self._carrier is None:
            loads = [(self._operations(outgoing, incoming, tag), transfer)]
            if self._cargo:
                loads.append(self._cargo.popleft())
            self._post(loads)
        else:
            count = self._carrier.size - 1
            pieces = zip(_cut(outgoing, count), _cut(incoming, count), strict=True)
            self._carrier._cargo.extend((self._operations(*piece, tag), transfer) for piece in pieces)
        return transfer

    def unload(self, transfer: Transfer) -> None:
        """Post what is left of a transfer that was to be carried, and what is before it."""
        loads = []
        while any(waiting_one is transfer for _, waiting_one in self._cargo):
            loads.append(self._cargo.popleft())
        self._post(loads)

    def _operations(
        self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], tag: int
    ) -> list[dist.P2POp]:
        # a piece of a batch with few rows may be empty
        return [
            dist.P2POp(function, tensor, peer, group=self._group, tag=tag)
            for function, tensors, peer in (
                (dist.isend, outgoing, self._right),
                (dist.irecv, incoming, self._left),
            )
            for tensor in tensors
            if tensor.numel()
        ]

    def _post(self, loads: list[tuple[list[dist.P2POp], Transfer]]) -> None:
        # in one call: NCCL hangs where sends and receives are not grouped alike on all ranks
        batch = [operation for operations, _ in loads for operation in operations]
        works = dist.batch_isend_irecv(batch) if batch else []
        # NCCL gives one work for the batch, gloo one for each message
        is_single = len(works) < len(batch)
        for operations, transfer in loads:
            transfer.works += works if is_single else works[: len(operations)]
            works = works if is_single else works[len(operations) :]


def _cut(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Cut every tensor along its rows; the pieces, each with its part of every tensor."""
    cuts = [tensor.tensor_split(count) for tensor in tensors]
    return [[cut[index] for cut in cuts] for index in range(count)]


class BlockStream:
    """Yields the blocks of the other members; the next is on its way before one is given out.

    buffers: where they are put, in turn; two by default, and what is yielded holds for one round only.
    """

    def __init__(self, ring: Ring, block: Embeddings, buffers: list[Embeddings] | None = None) -> None:
        self._ring = ring
        self._hops = ring.size - 1
        self._buffers = buffers or [block.new_empty(len(block.vectors)) for _ in range(min(2, self._hops))]
        self._transfer = self._start(block, 0)

    def __iter__(self) -> Iterator[Embeddings]:
        for hop in range(1, self._hops + 1):
            guest = Embeddings(*self._transfer.wait())
            if hop < self._hops:
                # with two buffers, the one written to was sent on and computed on in the last round
                self._transfer = self._start(guest, hop)
            yield guest

    def _start(self, block: Embeddings, hop: int) -> Transfer:
        arriving = self._buffers[hop % len(self._buffers)]
        return self._ring.start(block.tensors, arriving.tensors, tag=BLOCKS)


class GradientStream:
    """What the members compute for a travelling block follows it, one hop behind: each adds its share and passes on.

    dtype: of gradients `[n, E]` on their way, None = as they are. They are summed as they are.
    """

    def __init__(self, ring: Ring, dtype: torch.dtype | None) -> None:
        self._ring, self._dtype = ring, dtype
        self._arriving: list[Tensor] = []
        self._transfer: Transfer | None = None

    def pass_on(self, shares: list[Tensor]) -> None:
        """Add what came for this block to this rank's shares, in place, and send them to the right."""
        outgoing = [self._packed(share) for share in self.added_to(shares)]
        self._arriving = self._arriving or [torch.empty_like(tensor) for tensor in outgoing]
        self._transfer = self._ring.start(outgoing, self._arriving, tag=GRADIENTS)

    def added_to(self, shares: list[Tensor]) -> list[Tensor]:
        """Add what came last, in place: for this rank's own block, that is its sum over the other members."""
        if self._transfer is not None:
            for share, arrived in zip(shares, self._transfer.wait(), strict=True):
                share.add_(arrived)
        return shares

    def _packed(self, share: Tensor) -> Tensor:
        return share if self._dtype is None or share.ndim < 2 else share.to(self._dtype)
