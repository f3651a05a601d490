"""The model: two towers, the logit scale and bias, and the public `encode_image` and `encode_text`."""

import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from siglip_train.batch import Images
from siglip_train.models.text import TextConfig, TextTower
from siglip_train.models.vision import VisionConfig, VisionTower, patchify


@dataclass
class SiglipConfig:
    """Sizes of both towers; the embedding width E is `vision.width`."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)


def normalize(pooled: Tensor) -> Tensor:
    """Unit norm along the last dimension, in fp32 or better; 1e-8 is added to the norm, as in big_vision."""
    pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
    return pooled / (torch.linalg.vector_norm(pooled, dim=-1, keepdim=True) + 1e-8)


def class_embeddings(prompts: Tensor) -> Tensor:
    """Normalise each prompt, average over templates, normalise again: `[C, T, E]` -> `[C, E]`.

    The recipe of big_vision's discriminative classifier, of open_clip and of CLIP_benchmark.
    """
    unit = nn.functional.normalize(prompts, dim=-1)
    return nn.functional.normalize(unit.mean(dim=1), dim=-1)


class Siglip(nn.Module):
    """Image and text tower with logits `exp(logit_scale) * <image, text> + logit_bias` (SigLIP, section 3.2).

    logit_scale, logit_bias: shape (1,), as DeepSpeed cannot broadcast 0-dimensional parameters. The scale is
    stored as its logarithm and not clamped: released models go beyond 100.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.text = TextTower(config.text, embedding_dim=config.vision.width)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1))
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:  # noqa: ARG002 the towers draw, not this
        """Initial scale 10 and bias -10, with which the many negative pairs cost little (section 3.2)."""
        nn.init.constant_(self.logit_scale, math.log(10))
        nn.init.constant_(self.logit_bias, -10.0)

    def encode_image(self, images: Images | Tensor) -> Tensor:
        """Images, or pixels `[B, 3, H, W]` in -1..1 -> unit-norm `[B, E]` in fp32."""
        if isinstance(images, Tensor):
            if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
                raise ValueError(
                    f"pixels must be float [B, 3, H, W] in -1..1, not {images.dtype} {tuple(images.shape)}"
                )
            images = patchify(images, self.config.vision.patch_size)
        device = self.logit_scale.device
        moved = (None if part is None else part.to(device) for part in images)
        return normalize(self.vision(*moved).pooled)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, context_length]` int64 -> unit-norm `[B, E]` in fp32."""
        return normalize(self.text(tokens.to(self.logit_scale.device)).pooled)
