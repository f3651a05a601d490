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


def flops_per_pair(
    config: SiglipConfig, tokens: int | None = None, *, vision_passes: float = 3.0, text_passes: float = 3.0
) -> float:
    """Floating-point operations of forward and backward for one image-text pair, without any recomputation.

    Matrix products and attention only, the convention of MFU; each product costs twice as much backward as
    forward, except that of the stem, whose input needs no gradient. tokens: image tokens (L), default those
    of the configured square image. vision_passes, text_passes: what a tower's work is, in forward passes, see `passes`;
    0 = it is not run.
    """
    vision, text = config.vision, config.text
    vision_flops = image_flops(vision, vision.grid**2 if tokens is None else tokens, vision_passes)
    forward_text = text.depth * _block_flops(text.context_length, text.width, text.mlp_dim)
    if text.projection:
        forward_text += 2.0 * text.width * vision.width
    return vision_flops + text_passes * forward_text


def image_flops(vision: VisionConfig, tokens: int, passes: float = 3.0) -> float:
    """The vision tower's part of `flops_per_pair`, for an image of so many tokens."""
    seen = tokens + (vision.pool == "cls")
    stem = 2.0 * tokens * vision.patch_values * vision.width
    forward = vision.depth * _block_flops(seen, vision.width, vision.mlp_dim)
    if vision.pool == "map":
        forward += _pool_flops(tokens, vision.width, vision.mlp_dim)
    # of a tower that is not run at all there is no stem either
    stem_passes = min(passes, max(1.0, passes - 1))
    return stem_passes * stem + passes * forward


def passes(tower: nn.Module) -> float:
    """The work of a tower that is run and trained as its `requires_grad` say, in forward passes: 1 frozen, 3 trained.

    Between them, backward goes through all layers, and gives gradients to the share of weights that train: adapters
    need 2. A tower frozen up to some block needs less than this says.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in tower.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    return 2.0 + trained / sum(size for size, _ in sizes) if trained else 1.0


def _block_flops(length: int, width: int, mlp_dim: int) -> float:
    return 2.0 * length * (4 * width**2 + 2 * width * mlp_dim) + 4.0 * length**2 * width


def _pool_flops(length: int, width: int, mlp_dim: int) -> float:
    one_query = 2.0 * (2 * width**2 + 2 * width * mlp_dim) + 4.0 * length * width
    return one_query + 2.0 * length * 2 * width**2
