"""Small blocks on which the Triton kernels show whether they are right: odd sizes, edges, offset matches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from kernels.sigmoid_loss import chunked
from kernels.sigmoid_loss.pairs import PairIds, pair_up
from kernels.sigmoid_loss.triton.tiles import choose_tile, interpreted_tile
from kernels.testing import Comparison

# n, m, width, positives, scale: tiles that stick out, several chunks, and a width that no depth of a tile divides;
# one that all do, in two rounds of the finish; whole tiles without a match, where many logits are cut off
_BLOCKS = ((400, 203, 83, 7, 10.0), (130, 140, 320, -3, 20.0), (128, 256, 128, None, 60.0))
_BIAS = -2.0


@dataclass(frozen=True)
class BlockSample:
    """What decides which kernels a call runs. op: a function of `block.py`. weight: of pair ids, None without them."""

    op: str
    weight: float | None

    def __str__(self) -> str:
        """For the warning."""
        ids = {None: "", 0.0: ", with pair ids"}.get(self.weight, ", with weighed pair ids")
        return self.op + ids

    def __call__(self, device: torch.device, dtype: torch.dtype) -> Iterator[Comparison]:
        """Run the blocks by Triton, with the tile that is taken where nothing is tuned, and in float64 by torch."""
        # here, because importing Triton takes long and machines without a GPU need not have it
        from kernels.sigmoid_loss.triton import block as triton_block

        tile = interpreted_tile(dtype.itemsize)
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            tile = choose_tile(capability, dtype.itemsize)
        generator = torch.Generator().manual_seed(0)
        for n, m, width, positives, scale in _BLOCKS:
            embeddings = torch.randn(n + m, width, generator=generator, dtype=torch.float64, device="cpu")
            images, texts = normalize(embeddings).to(device, dtype).split([n, m])
            scalars = torch.tensor([scale, _BIAS], device=device).unbind()
            options = {"positives": positives, "ids": self._ids(n, m, device)}
            actual = getattr(triton_block, self.op)(images, texts, *scalars, **options, tile=tile)
            exact = (tensor.double() for tensor in (images, texts, *scalars))
            yield from pair_up(actual, getattr(chunked, self.op)(*exact, **options))

    def _ids(self, n: int, m: int, device: torch.device) -> PairIds | None:
        if self.weight is None:
            return None
        # every text has a like among the images, some of them in the same tile; images without ids
        images, texts = torch.arange(n, device=device) % 90 - 9, torch.arange(m, device=device) % 70
        return PairIds(images, texts, self.weight)
