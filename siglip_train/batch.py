"""What travels from the loader to the model: `Batch` and its parts. Data fills them, models and objectives read."""

from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor


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
    """One rank's share of a global batch.

    images: B images, None where `pooled` stands in their place. texts: `[B, context_length]` int64 tokens, `[B, 0]` of
    sources without captions. keys: B sample names (`shard/key`), for messages. labels: `[B]` int64 class indices, None
    of sources without. pooled: `[B, D]` what a locked image tower made of the images once, not normalised.
    """

    images: Images | None
    texts: Tensor
    keys: tuple[str, ...] = ()
    labels: Tensor | None = None
    pooled: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of image-text pairs."""
        return len(self.texts)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """`change` every tensor there is."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return self._replace(
            images=None if self.images is None else Images(*map(changed, self.images)),  # type: ignore[arg-type]
            texts=change(self.texts),
            labels=changed(self.labels),
            pooled=changed(self.pooled),
        )

    def to(self, device: torch.device) -> "Batch":
        """Copy every tensor to `device`, asynchronously from pinned memory."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> list["Batch"]:
        """Views of `size` pairs each, in order; the last has what is left."""
        parts = [slice(start, start + size) for start in range(0, self.size, size)]
        return [self.each(itemgetter(rows))._replace(keys=self.keys[rows]) for rows in parts]
