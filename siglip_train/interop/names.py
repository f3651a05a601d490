"""One table of parameter names: ours beside those of HuggingFace, of open_clip (for vision, timm's) and of big_vision.

In a name, `*` stands for weight and bias, `{}` for the number of the block, and a trailing `#i/n` for part i
of n equal parts along the first dimension, where a format fuses projections. big_vision's weights are called
`kernel`, those of a LayerNorm `scale`.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from siglip_train.interop.native import complain, parameter_shapes
from siglip_train.models.siglip import SiglipConfig

Convention = Literal["huggingface", "open_clip", "big_vision"]


class Row(NamedTuple):
    """The name of one parameter, or of a family of them, in each convention."""

    ours: str
    huggingface: str
    open_clip: str
    big_vision: str


class Place(NamedTuple):
    """Where a parameter is found: part `part` of `parts` of a tensor."""

    name: str
    part: int = 0
    parts: int = 1


_MODEL = (
    Row(
        "vision.patch_embedding.*",
        "vision_model.embeddings.patch_embedding.*",
        "visual.trunk.patch_embed.proj.*",
        "img/embedding/*",
    ),
    Row(
        "vision.position_table",
        "vision_model.embeddings.position_embedding.weight",
        "visual.trunk.pos_embed",
        "img/pos_embedding",
    ),
    # neither library's SigLIP has a class token; towers of other origin do
    Row(
        "vision.cls_token",
        "vision_model.embeddings.class_embedding",
        "visual.trunk.cls_token",
        "img/cls",
    ),
    Row(
        "vision.encoder.norm.*",
        "vision_model.post_layernorm.*",
        "visual.trunk.norm.*",
        "img/Transformer/encoder_norm/*",
    ),
    Row(
        "text.token_embedding.weight",
        "text_model.embeddings.token_embedding.weight",
        "text.token_embedding.weight",
        "txt/Embed_0/embedding",
    ),
    Row(
        "text.position_table",
        "text_model.embeddings.position_embedding.weight",
        "text.positional_embedding",
        "txt/pos_embedding",
    ),
    Row(
        "text.encoder.norm.*",
        "text_model.final_layer_norm.*",
        "text.ln_final.*",
        "txt/Encoder_0/encoder_norm/*",
    ),
    Row("text.head.*", "text_model.head.*", "text.text_projection.*", "txt/head/*"),
    Row("logit_scale", "logit_scale", "logit_scale", "t"),
    Row("logit_bias", "logit_bias", "logit_bias", "b"),
)

_MAP_HEAD_PREFIX = Row("vision.pool.", "vision_model.head.", "visual.trunk.attn_pool.", "img/MAPHead_0/")
_MAP_HEAD = (
    Row("probe", "probe", "latent", "probe"),
    Row("attention.query.*", "attention.in_proj_*#0/3", "q.*", "MultiHeadDotProductAttention_0/query/*"),
    Row("attention.key.*", "attention.in_proj_*#1/3", "kv.*#0/2", "MultiHeadDotProductAttention_0/key/*"),
    Row("attention.value.*", "attention.in_proj_*#2/3", "kv.*#1/2", "MultiHeadDotProductAttention_0/value/*"),
    Row("attention.out.*", "attention.out_proj.*", "proj.*", "MultiHeadDotProductAttention_0/out/*"),
    Row("norm.*", "layernorm.*", "norm.*", "LayerNorm_0/*"),
    Row("mlp.fc1.*", "mlp.fc1.*", "mlp.fc1.*", "MlpBlock_0/Dense_0/*"),
    Row("mlp.fc2.*", "mlp.fc2.*", "mlp.fc2.*", "MlpBlock_0/Dense_1/*"),
)

_VISION_BLOCK_PREFIX = Row(
    "vision.encoder.blocks.{}.",
    "vision_model.encoder.layers.{}.",
    "visual.trunk.blocks.{}.",
    "img/Transformer/encoderblock_{}/",
)
_VISION_BLOCK = (
    Row("norm1.*", "layer_norm1.*", "norm1.*", "LayerNorm_0/*"),
    Row(
        "attention.query.*", "self_attn.q_proj.*", "attn.qkv.*#0/3", "MultiHeadDotProductAttention_0/query/*"
    ),
    Row("attention.key.*", "self_attn.k_proj.*", "attn.qkv.*#1/3", "MultiHeadDotProductAttention_0/key/*"),
    Row(
        "attention.value.*", "self_attn.v_proj.*", "attn.qkv.*#2/3", "MultiHeadDotProductAttention_0/value/*"
    ),
    Row("attention.out.*", "self_attn.out_proj.*", "attn.proj.*", "MultiHeadDotProductAttention_0/out/*"),
    Row("norm2.*", "layer_norm2.*", "norm2.*", "LayerNorm_1/*"),
    Row("mlp.fc1.*", "mlp.fc1.*", "mlp.fc1.*", "MlpBlock_0/Dense_0/*"),
    Row("mlp.fc2.*", "mlp.fc2.*", "mlp.fc2.*", "MlpBlock_0/Dense_1/*"),
)

_TEXT_BLOCK_PREFIX = Row(
    "text.encoder.blocks.{}.",
    "text_model.encoder.layers.{}.",
    "text.transformer.resblocks.{}.",
    "txt/Encoder_0/encoderblock_{}/",
)
# beside the vision tower's, only open_clip has other names here
_TEXT_BLOCK = tuple(
    row._replace(open_clip=theirs)
    for row, theirs in zip(
        _VISION_BLOCK,
        (
            "ln_1.*",
            "attn.in_proj_*#0/3",
            "attn.in_proj_*#1/3",
            "attn.in_proj_*#2/3",
            "attn.out_proj.*",
            "ln_2.*",
            "mlp.c_fc.*",
            "mlp.c_proj.*",
        ),
        strict=True,
    )
)


def places(config: SiglipConfig, convention: Convention) -> dict[str, Place]:
    """Our name -> place in the other convention, for every parameter of this model that it knows."""
    return _places_of(parameter_shapes(config), config, convention)


def _places_of(ours: Container[str], config: SiglipConfig, convention: Convention) -> dict[str, Place]:
    found = {row.ours: _place(getattr(row, convention)) for row in _rows(config)}
    return {name: place for name, place in found.items() if name in ours}


def translate(
    tensors: Mapping[str, Tensor],
    config: SiglipConfig,
    convention: Convention,
    *,
    where: Path,
    skip: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Weights of another convention as a state dict of ours, in fp32.

    skip: beginnings of our names, which are left out and may be missing, and of theirs, which may be left over and keep
    their own. Raises `UserError` with the names that are missing, left over, or not of the shape which the config says.
    """
    shapes = parameter_shapes(config)
    known = _places_of(shapes, config, convention)
    wanted = {ours: place for ours, place in known.items() if not ours.startswith(tuple(skip))}
    extra = tensors.keys() - {place.name for place in known.values()}
    allowed = {name for name in extra if name.startswith(tuple(skip))}
    needed = {place.name for place in wanted.values()}
    complain(where, missing=needed - tensors.keys(), unexpected=extra - allowed)
    state, misshapen = {name: tensors[name] for name in sorted(allowed)}, set()
    for ours, place in wanted.items():
        tensor = _as_linear(tensors[place.name])
        parts = tensor.tensor_split(place.parts) if place.parts > 1 else (tensor,)
        part = parts[place.part]
        if _without_ones(part.shape) != _without_ones(shapes[ours]):
            misshapen.add(f"{place.name} {list(tensors[place.name].shape)}")
            continue
        state[ours] = part.reshape(shapes[ours]).to(torch.float32, memory_format=torch.contiguous_format)
    complain(where, misshapen=misshapen)
    return state


def translate_back(
    state: Mapping[str, Tensor], config: SiglipConfig, convention: Literal["huggingface", "open_clip"]
) -> dict[str, Tensor]:
    """A state dict of ours in another convention: fused where it fuses, with its leading dimensions of one.

    The stem is a convolution there, except in HuggingFace's NaFlex model.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    where = _places_of(state, config, convention)
    for ours, place in where.items():
        parts.setdefault(place.name, {})[place.part] = state[ours]
    tensors = {name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}
    stem = where["vision.patch_embedding.weight"].name
    if convention == "open_clip" or config.vision.position_grid is None:
        size = config.vision.patch_size
        tensors[stem] = tensors[stem].reshape(-1, size, size, 3).permute(0, 3, 1, 2).contiguous()
    if convention == "open_clip":
        table = where["vision.position_table"].name
        tensors[table] = tensors[table][None]
        for name in ("logit_scale", "logit_bias"):
            tensors[name] = tensors[name].reshape(())
    return tensors


def _rows(config: SiglipConfig) -> Iterator[Row]:
    """Every row for a model of this depth, written out."""
    families = [
        (Row("", "", "", ""), _MODEL, 1),
        (_MAP_HEAD_PREFIX, _MAP_HEAD, 1),
        (_VISION_BLOCK_PREFIX, _VISION_BLOCK, config.vision.depth),
        (_TEXT_BLOCK_PREFIX, _TEXT_BLOCK, config.text.depth),
    ]
    for prefix, rows, count in families:
        for number in range(count):
            for row in rows:
                full = [
                    (start + end).replace("{}", str(number)) for start, end in zip(prefix, row, strict=True)
                ]
                leaves = ("weight", "bias") if "*" in row.ours else ("",)
                yield from (Row(*(_with_leaf(name, leaf) for name in full)) for leaf in leaves)


def _with_leaf(name: str, leaf: str) -> str:
    is_flax = "/" in name.partition("#")[0]
    if is_flax and leaf == "weight":
        leaf = "scale" if "norm" in name.lower() else "kernel"
    return name.replace("*", leaf)


def _place(text: str) -> Place:
    name, _, fraction = text.partition("#")
    if not fraction:
        return Place(name)
    part, parts = fraction.split("/")
    return Place(name, int(part), int(parts))


def _as_linear(tensor: Tensor) -> Tensor:
    """The kernel of a convolutional stem `[D, 3, p, p]` -> `[D, P]` in (row, column, channel) order."""
    # a position table kept as an image also has four dimensions, but a batch of one and no three channels
    is_stem = tensor.ndim == 4 and tensor.shape[1] == 3
    return tensor.permute(0, 2, 3, 1).flatten(1) if is_stem else tensor


def _without_ones(shape: torch.Size) -> list[int]:
    """Formats differ in leading dimensions of one: positions [1, N, D], a scale []."""
    return [size for size in shape if size != 1]
