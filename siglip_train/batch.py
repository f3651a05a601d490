"""What travels from the loader to the model: `Batch`, generic over what it holds, and `Images`, one of its parts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from siglip_train.errors import UserError


class Images(NamedTuple):
    """Images as patches, so that a fixed resolution and a variable grid (NaFlex) are one format.

    patches: `[B, L, P]`, uint8 levels 0..255 or float in -1..1; P = patch * patch * 3 in (row, column, channel)
        order.
    grid: `[B, L, 2]` int, (row, column) of each patch; (0, 0) at padding.
    mask: `[B, L]` bool, True = a real patch. None = no padding, and every image has the grid of the first.
    """

    patches: Tensor
    grid: Tensor
    mask: Tensor | None = None


class Batch(NamedTuple):
    """One rank's share of a global batch, or some of its samples.

    parts: what the inputs of the run have made (`data/inputs`), by their names: `images`, `texts` (`[B,
    context_length]` int64 tokens), `labels` (`[B]` int64), …; tensors, also nested ones, of B rows each. keys: B
    sample names (`shard/key`), for messages.
    """

    parts: dict[str, Any]
    keys: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of samples, B."""
        return len(next(leaf for leaf in tree_leaves(self.parts) if isinstance(leaf, Tensor)))

    def part(self, name: str) -> Any:
        """What an input has made. Raises `UserError` where the run has no such input."""
        if name not in self.parts:
            raise UserError(
                f"an objective asks for the {name} of a batch, which holds {', '.join(self.parts)}: the objective must"
                " name the input among its `inputs`"
            )
        return self.parts[name]

    def each(self, change: Callable[[Tensor], Any]) -> "Batch":
        """`change` every tensor there is."""
        return self._replace(parts=tree_map_only(Tensor, change, self.parts))

    def to(self, device: torch.device) -> "Batch":
        """Copy every tensor to `device`, asynchronously from pinned memory."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, chosen: slice) -> "Batch":
        """A view of some samples."""
        return self.each(lambda tensor: tensor[chosen])._replace(keys=self.keys[chosen])

    def split(self, size: int) -> list["Batch"]:
        """Views of `size` samples each, in order; the last has what is left."""
        return [self.rows(slice(start, start + size)) for start in range(0, self.size, size)]


def join(batches: Sequence[Batch], *, pin_memory: bool = False) -> Batch:
    """One batch of the samples of several, a copy, which lies in pinned memory on request."""

    def joined(*leaves: Any) -> Any:
        if not isinstance(leaves[0], Tensor):
            return leaves[0]
        shape = (sum(map(len, leaves)), *leaves[0].shape[1:])
        return torch.cat(leaves, out=torch.empty(shape, dtype=leaves[0].dtype, pin_memory=pin_memory))

    parts = tree_map(joined, *(batch.parts for batch in batches))
    return Batch(parts, tuple(key for batch in batches for key in batch.keys))
