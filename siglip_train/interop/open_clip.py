"""Read a SigLIP model in open_clip's layout: a timm vision tower and open_clip's text tower."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.interop.files import read_json, read_tensors, section
from siglip_train.interop.names import translate
from siglip_train.interop.native import Description, ModelFiles, Resize, stored_rules, tokenizer_in
from siglip_train.models.layers import LAYER_NORM_EPS, Gelu
from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"

# the part of timm's name that says the size -> width, depth, mlp_dim, heads
_TIMM_SIZES = {
    "base": (768, 12, 3072, 12),
    "large": (1024, 24, 4096, 16),
    "so400m": (1152, 27, 4304, 16),
    "giantopt": (1536, 40, 6144, 16),
}
# size, patch, pixels of those that open_clip's own configs name
_TIMM_TOWERS = {
    *(("base", 16, pixels) for pixels in (224, 256, 384, 512)),
    ("base", 32, 256),
    *(("large", 16, pixels) for pixels in (256, 384, 512)),
    *(("so400m", 14, pixels) for pixels in (224, 378, 384)),
    *(("so400m", 16, pixels) for pixels in (256, 384, 512)),
    *(("giantopt", 16, pixels) for pixels in (256, 384)),
}
_TIMM_NAME = re.compile(r"vit_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)_siglip_(?P<image>\d+)")
_SIGLIP_2_VOCABULARY = 256000
# what timm calls the activations, and where a tower without a name of timm's is described
_TIMM_ACTIVATIONS: dict[str, Gelu] = {"gelu_tanh": "tanh", "gelu": "erf"}
_LOCAL = "local-dir:"
TRUNK = "trunk"


@dataclass
class Vision:
    """The vision_cfg."""

    timm_model_name: str = ""
    timm_pool: str = ""
    image_size: int | None = None


@dataclass
class Text:
    """The text_cfg."""

    context_length: int
    vocab_size: int
    width: int
    heads: int
    layers: int
    mlp_ratio: float = 4.0
    no_causal_mask: bool = False
    pool_type: str = ""
    norm_kwargs: dict[str, Any] = field(default_factory=dict)
    act_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    proj_type: str = "linear"
    proj_bias: bool = False
    quick_gelu: bool = False
    hf_model_name: str | None = None


@dataclass
class _TrunkArguments:
    """The model_args of a tower that is described to timm."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    act_layer: Literal["gelu_tanh", "gelu"]


@dataclass
class _Trunk:
    model_args: dict[str, Any]


@dataclass
class _Preprocess:
    """The preprocess_cfg."""

    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: Resize = "bicubic"


def read_open_clip(path: Path, skip: Sequence[str] = (), *, vision: VisionConfig | None = None) -> ModelFiles:
    """Read a model from a folder with `open_clip_config.json`, or from a model JSON beside the weights.

    skip: as `translate` takes it. vision: sizes of the vision tower, for a timm name that is no released
    `vit_<size>_patch<p>_siglip_<px>`.
    Raises `UserError` for a model that differs from SigLIP, or tensors that do not fit the config.
    """
    description = describe_open_clip(path, vision=vision)
    weights = (path if path.is_dir() else path.parent) / WEIGHTS_FILE
    state = translate(read_tensors(weights), description.config, "open_clip", where=weights, skip=skip)
    return ModelFiles(description, state)


def describe_open_clip(path: Path, *, vision: VisionConfig | None = None) -> Description:
    """Everything but the weights of such a folder or model JSON; `vision` as `read_open_clip` takes it."""
    config_path = path / CONFIG_FILE if path.is_dir() else path
    folder = config_path.parent
    content = read_json(config_path)
    model = content.get("model_cfg", content)
    if not isinstance(model, dict) or not {"vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(f"{config_path} is no model config of open_clip: no vision_cfg and text_cfg")
    text = section(Text, model["text_cfg"], config_path, "text_cfg")
    config = SiglipConfig(
        vision
        or _vision_config(section(Vision, model["vision_cfg"], config_path, "vision_cfg"), config_path),
        _text_config(text, config_path),
    )
    if model.get("embed_dim") != config.vision.width:
        raise UserError(
            f"{config_path}: embed_dim is not the width {config.vision.width} of the vision tower"
        )
    return Description(
        config,
        tokenizer=tokenizer_in(folder),
        rules=stored_rules(folder) or _rules(text),
        resize=_resize(content.get("preprocess_cfg", {}), config_path),
        origin="open_clip",
    )


def _vision_config(values: Vision, where: Path) -> VisionConfig:
    name = values.timm_model_name
    if name.startswith(_LOCAL):
        return _described_trunk(name.removeprefix(_LOCAL), where)
    match = _TIMM_NAME.fullmatch(name)
    if match is None or match["size"] not in _TIMM_SIZES or values.timm_pool != "map":
        raise UserError(f"{where}: vision tower {name!r} is not one of timm's SigLIP towers with pool map")
    width, depth, mlp_dim, heads = _TIMM_SIZES[match["size"]]
    config = VisionConfig(
        image_size=int(match["image"]),
        patch_size=int(match["patch"]),
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        heads=heads,
        gelu=_timm_gelu(match["size"], int(match["patch"]), int(match["image"])),
    )
    return replace(config, image_size=values.image_size or config.image_size)


def _described_trunk(path: str, where: Path) -> VisionConfig:
    """The tower that the folder `trunk` beside the config describes, wherever that folder once was."""
    described = where.parent / TRUNK / "config.json"
    if not described.is_file():
        described = Path(path) / "config.json"
    trunk = section(_Trunk, read_json(described), described)
    arguments = section(_TrunkArguments, trunk.model_args, described, "model_args")
    return VisionConfig(
        image_size=arguments.img_size,
        patch_size=arguments.patch_size,
        width=arguments.embed_dim,
        depth=arguments.depth,
        mlp_dim=int(arguments.embed_dim * arguments.mlp_ratio),
        heads=arguments.num_heads,
        gelu=_TIMM_ACTIVATIONS[arguments.act_layer],
    )


def trunk_path(folder: Path) -> str:
    """The name by which timm finds the description of a tower in `folder`."""
    return f"{_LOCAL}{folder.resolve() / TRUNK}"


def timm_name(config: VisionConfig) -> str | None:
    """timm's name for exactly this tower, its GELU included; None where timm has none."""
    sizes = (config.width, config.depth, config.mlp_dim, config.heads)
    size = next((size for size, known in _TIMM_SIZES.items() if known == sizes), None)
    if size is None or (size, config.patch_size, config.image_size) not in _TIMM_TOWERS:
        return None
    if _timm_gelu(size, config.patch_size, config.image_size) != config.gelu:
        return None
    return f"vit_{size}_patch{config.patch_size}_siglip_{config.image_size}"


def _timm_gelu(size: str, patch: int, image: int) -> Literal["tanh", "erf"]:
    """The GELU timm gives a tower of this name; not always the one it was trained with, which is tanh."""
    is_tanh = (
        patch == 32
        or size == "giantopt"
        or (size, patch) == ("so400m", 16)
        or (size, image) == ("large", 512)
    )
    return "tanh" if is_tanh else "erf"


def _text_config(values: Text, where: Path) -> TextConfig:
    projection = values.proj_type != "none"
    required = {
        "no_causal_mask": values.no_causal_mask,
        "pool_type last": values.pool_type == "last",
        f"norm_kwargs.eps {LAYER_NORM_EPS}": values.norm_kwargs.get("eps") == LAYER_NORM_EPS,
        "proj_bias": values.proj_bias or not projection,
        "no quick_gelu": not values.quick_gelu,
        "no hf_model_name": not values.hf_model_name,
    }
    absent = [setting for setting, is_met in required.items() if not is_met]
    if absent:
        raise UserError(f"{where}: the text tower is not SigLIP's, which has {', '.join(absent)}")
    return TextConfig(
        context_length=values.context_length,
        vocab_size=values.vocab_size,
        width=values.width,
        depth=values.layers,
        mlp_dim=int(values.width * values.mlp_ratio),
        heads=values.heads,
        gelu="tanh" if values.act_kwargs.get("approximate") == "tanh" else "erf",
        projection=projection,
    )


def _rules(text: Text) -> TextRules:
    """As open_clip cleans: it strips punctuation for SigLIP 2 as well, which the authors did not."""
    is_siglip_2 = text.vocab_size == _SIGLIP_2_VOCABULARY
    clean = text.tokenizer_kwargs.get("clean", "canonicalize")
    return TextRules(
        lowercase=clean in ("lower", "canonicalize"),
        strip_punctuation=clean == "canonicalize",
        pad="pad" if is_siglip_2 else "eos",
    )


def _resize(content: Any, where: Path) -> Resize:
    preprocess = section(_Preprocess, content, where, "preprocess_cfg")
    for key in ("mean", "std"):
        values = getattr(preprocess, key) or []
        if any(value != 0.5 for value in values):
            raise UserError(f"{where}: {key} {values} is not supported, only 0.5")
    return preprocess.interpolation
