"""What travels from the loader to the model: `Batch` and its parts. Data fills them, models and objectives read."""

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

    images: B images. texts: `[B, context_length]` int64 tokens, `[B, 0]` of sources without captions.
    keys: B sample names (`shard/key`), for messages. labels: `[B]` int64 class indices, None of sources without.
    """

    images: Images
    texts: Tensor
    keys: tuple[str, ...] = ()
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of image-text pairs."""
        return len(self.texts)

    def to(self, device: torch.device) -> "Batch":
        """Copy every tensor to `device`, asynchronously from pinned memory."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        images = Images(*(move(field) for field in self.images))  # type: ignore[arg-type]
        texts = self.texts.to(device, non_blocking=True)
        return self._replace(images=images, texts=texts, labels=move(self.labels))

    def split(self, size: int) -> list["Batch"]:
        """Views of `size` pairs each, in order; the last has what is left."""

        def part(rows: slice) -> "Batch":
            images = Images(*(None if field is None else field[rows] for field in self.images))  # type: ignore[arg-type]
            labels = None if self.labels is None else self.labels[rows]
            return Batch(images, self.texts[rows], self.keys[rows], labels)

        return [part(slice(start, start + size)) for start in range(0, self.size, size)]
