"""The operations of a training step, by the convention of MFU."""

from torch import nn

from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.vision import VisionConfig


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
    if text.bottleneck:
        forward_text += 2.0 * text.context_length * text.bottleneck * text.width
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
