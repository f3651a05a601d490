"""Read a SigLIP model in open_clip's layout: a timm vision tower and open_clip's text tower."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.interop.files import read_json, read_tensors
from siglip_train.interop.names import translate
from siglip_train.interop.native import Description, ModelFiles, tokenizer_in
from siglip_train.models.layers import LAYER_NORM_EPS
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
_TIMM_NAME = re.compile(r"vit_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)_siglip_(?P<image>\d+)")
_SIGLIP_2_VOCABULARY = 256000


def read_open_clip(path: Path, *, vision: VisionConfig | None = None) -> ModelFiles:
    """Read a model from a folder with `open_clip_config.json`, or from a model JSON beside the weights.

    vision: sizes of the vision tower, for a timm name that is no released `vit_<size>_patch<p>_siglip_<px>`.
    Raises `UserError` for a model that differs from SigLIP, or tensors that do not fit the config.
    """
    config_path = path / CONFIG_FILE if path.is_dir() else path
    folder = config_path.parent
    content = read_json(config_path)
    model = content.get("model_cfg", content)
    if not {"vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(f"{config_path} is no model config of open_clip: no vision_cfg and text_cfg")
    config = SiglipConfig(
        vision or _vision_config(model["vision_cfg"], config_path),
        _text_config(model["text_cfg"], config_path),
    )
    if model.get("embed_dim") != config.vision.width:
        raise UserError(
            f"{config_path}: embed_dim is not the width {config.vision.width} of the vision tower"
        )
    description = Description(
        config,
        tokenizer=tokenizer_in(folder),
        rules=_rules(model["text_cfg"]),
        resize=_resize(content.get("preprocess_cfg", {}), config_path),
    )
    state = translate(read_tensors(folder / WEIGHTS_FILE), config, "open_clip", where=folder / WEIGHTS_FILE)
    return ModelFiles(description, state)


def _vision_config(values: Mapping[str, Any], where: Path) -> VisionConfig:
    name = values.get("timm_model_name", "")
    match = _TIMM_NAME.fullmatch(name)
    if match is None or match["size"] not in _TIMM_SIZES or values.get("timm_pool") != "map":
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
    return replace(config, image_size=values.get("image_size") or config.image_size)


def _timm_gelu(size: str, patch: int, image: int) -> Literal["tanh", "erf"]:
    """The GELU timm gives a tower of this name; not always the one it was trained with, which is tanh."""
    is_tanh = (
        patch == 32
        or size == "giantopt"
        or (size, patch) == ("so400m", 16)
        or (size, image) == ("large", 512)
    )
    return "tanh" if is_tanh else "erf"


def _text_config(values: Mapping[str, Any], where: Path) -> TextConfig:
    projection = values.get("proj_type", "linear") != "none"
    required = {
        "no_causal_mask": values.get("no_causal_mask", False) is True,
        "pool_type last": values.get("pool_type") == "last",
        f"norm_kwargs.eps {LAYER_NORM_EPS}": values.get("norm_kwargs", {}).get("eps") == LAYER_NORM_EPS,
        "proj_bias": values.get("proj_bias", False) is True or not projection,
        "no quick_gelu": not values.get("quick_gelu", False),
        "no hf_model_name": not values.get("hf_model_name"),
    }
    absent = [setting for setting, is_met in required.items() if not is_met]
    if absent:
        raise UserError(f"{where}: the text tower is not SigLIP's, which has {', '.join(absent)}")
    width = values["width"]
    return TextConfig(
        context_length=values["context_length"],
        vocab_size=values["vocab_size"],
        width=width,
        depth=values["layers"],
        mlp_dim=int(width * values.get("mlp_ratio", 4.0)),
        heads=values["heads"],
        gelu="tanh" if values.get("act_kwargs", {}).get("approximate") == "tanh" else "erf",
        projection=projection,
    )


def _rules(text: Mapping[str, Any]) -> TextRules:
    """As open_clip cleans: it strips punctuation for SigLIP 2 as well, which the authors did not."""
    is_siglip_2 = text["vocab_size"] == _SIGLIP_2_VOCABULARY
    clean = text.get("tokenizer_kwargs", {}).get("clean", "canonicalize")
    return TextRules(
        lowercase=clean in ("lower", "canonicalize"),
        strip_punctuation=clean == "canonicalize",
        pad="pad" if is_siglip_2 else "eos",
    )


def _resize(preprocess: Mapping[str, Any], where: Path) -> Literal["bilinear", "bicubic"]:
    for key in ("mean", "std"):
        if any(value != 0.5 for value in preprocess.get(key) or ()):
            raise UserError(f"{where}: {key} {preprocess[key]} is not supported, only 0.5")
    interpolation = preprocess.get("interpolation", "bicubic")
    if interpolation not in ("bilinear", "bicubic"):
        raise UserError(f"{where}: interpolation {interpolation} is not supported, only bilinear and bicubic")
    return interpolation
