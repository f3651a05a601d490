"""A model's weights in big_vision's layout, from its own names and shapes: written without the table under test."""

import numpy as np
import torch
from torch import Tensor, nn

from siglip_train.models.layers import Attention, Mlp
from siglip_train.models.siglip import Siglip

ATTENTION = "MultiHeadDotProductAttention_0"


def flax_arrays(model: Siglip, *, stacked: bool = False) -> dict[str, np.ndarray]:
    """The arrays of `params`, as `flax_tensors`."""
    return {f"params/{name}": t.detach().numpy() for name, t in flax_tensors(model, stacked=stacked).items()}


def flax_tensors(model: Siglip, *, stacked: bool = False) -> dict[str, Tensor]:
    """Names and tensors, blocks apart or, as a scan over layers leaves them, along a first axis."""
    vision, text = model.vision, model.text
    config = model.config.vision
    side, width, patch = config.table_side, config.width, config.patch_size
    kernel = vision.patch_embedding.weight.T
    positions = vision.position_table.reshape(1, -1, width)
    if config.position_grid is None:
        kernel = kernel.reshape(patch, patch, 3, width)
    else:
        positions = vision.position_table.reshape(side, side, width)
    arrays = {
        "img/embedding/kernel": kernel,
        "img/embedding/bias": vision.patch_embedding.bias,
        "img/pos_embedding": positions,
        "img/MAPHead_0/probe": vision.pool.probe,
        "txt/Embed_0/embedding": text.token_embedding.weight,
        "txt/pos_embedding": text.position_table[None],
        "t": model.logit_scale,
        "b": model.logit_bias,
        **_attention(f"img/MAPHead_0/{ATTENTION}", vision.pool.attention),
        **_norm("img/MAPHead_0/LayerNorm_0", vision.pool.norm),
        **_mlp("img/MAPHead_0/MlpBlock_0", vision.pool.mlp),
    }
    if isinstance(text.head, nn.Linear):
        arrays |= {"txt/head/kernel": text.head.weight.T, "txt/head/bias": text.head.bias}
    for encoder, prefix in ((vision.encoder, "img/Transformer"), (text.encoder, "txt/Encoder_0")):
        blocks = [_block(block) for block in encoder.blocks]
        if stacked:
            joined = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
            arrays |= {f"{prefix}/encoderblock/{name}": tensor for name, tensor in joined.items()}
        else:
            for number, block in enumerate(blocks):
                arrays |= {f"{prefix}/encoderblock_{number}/{name}": tensor for name, tensor in block.items()}
        arrays |= _norm(f"{prefix}/encoder_norm", encoder.norm)
    return arrays


def _block(block: nn.Module) -> dict[str, Tensor]:
    return {
        **_norm("LayerNorm_0", block.norm1),
        **_attention(ATTENTION, block.attention),
        **_norm("LayerNorm_1", block.norm2),
        **_mlp("MlpBlock_0", block.mlp),
    }


def _norm(prefix: str, norm: nn.LayerNorm) -> dict[str, Tensor]:
    return {f"{prefix}/scale": norm.weight, f"{prefix}/bias": norm.bias}


def _mlp(prefix: str, mlp: Mlp) -> dict[str, Tensor]:
    return {
        f"{prefix}/{name}/{leaf}": tensor
        for name, linear in (("Dense_0", mlp.fc1), ("Dense_1", mlp.fc2))
        for leaf, tensor in (("kernel", linear.weight.T), ("bias", linear.bias))
    }


def _attention(prefix: str, attention: Attention) -> dict[str, Tensor]:
    width, heads = attention.query.in_features, attention.heads
    tensors = {}
    for name in ("query", "key", "value"):
        linear = getattr(attention, name)
        tensors[f"{prefix}/{name}/kernel"] = linear.weight.T.reshape(width, heads, width // heads)
        tensors[f"{prefix}/{name}/bias"] = linear.bias.reshape(heads, width // heads)
    tensors[f"{prefix}/out/kernel"] = attention.out.weight.T.reshape(heads, width // heads, width)
    tensors[f"{prefix}/out/bias"] = attention.out.bias
    return tensors
