"""A model and a batch small enough for a single core, shared by the tests of the objectives."""

import torch

from siglip_train.batch import Batch
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig, patchify


def tiny_model(dtype: torch.dtype = torch.float64) -> Siglip:
    """Two one-layer towers, the same in every call."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=8, width=16, depth=1, mlp_dim=32, heads=2)
    text = TextConfig(context_length=5, vocab_size=23, width=16, depth=1, mlp_dim=32, heads=2)
    return Siglip(SiglipConfig(vision, text)).to(dtype)


def tiny_batch(size: int, dtype: torch.dtype = torch.float64) -> Batch:
    """`size` random pairs; a smaller batch is the beginning of a larger one."""
    pairs = [_pair(seed, dtype) for seed in range(size)]
    images = patchify(torch.stack([pixels for pixels, _ in pairs]), 8)
    return Batch({"images": images, "texts": torch.stack([tokens for _, tokens in pairs])})


def _pair(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    return pixels.to(dtype), torch.randint(23, (5,), generator=generator)
