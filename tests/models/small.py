"""A model small enough for float64 and finite patience, and inputs for it."""

import torch
from torch import Tensor

from siglip_train.batch import Images
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig, patchify

VOCAB = 19
CONTEXT = 5


def small_config(**vision: object) -> SiglipConfig:
    sizes = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "mlp_dim": 40, "heads": 3} | vision
    return SiglipConfig(
        VisionConfig(**sizes),
        TextConfig(context_length=CONTEXT, vocab_size=VOCAB, width=16, depth=2, mlp_dim=20, heads=2),
    )


def small_model(**vision: object) -> Siglip:
    torch.manual_seed(0)
    return Siglip(small_config(**vision))


def some_pixels(batch: int = 3, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def some_tokens(batch: int = 3) -> Tensor:
    return torch.randint(VOCAB, (batch, CONTEXT), generator=torch.Generator().manual_seed(2))


def padded(images: Images, length: int, *, content: float = 0.0) -> Images:
    """The same images with padding up to `length` patches, filled with `content`."""
    extra = length - images.patches.shape[1]
    mask = torch.ones(images.patches.shape[:2], dtype=torch.bool)
    pad = torch.nn.functional.pad
    return Images(
        pad(images.patches, (0, 0, 0, extra), value=content),
        pad(images.grid, (0, 0, 0, extra)),
        pad(mask, (0, extra), value=False),
    )


def rectangle(batch: int, rows: int, columns: int) -> Images:
    return patchify(some_pixels(batch, rows * 4, columns * 4), 4)
