"""Read a HuggingFace folder of a SigLIP model (model_type siglip) or a SigLIP 2 NaFlex model (siglip2)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.interop.files import read_json, read_tensors
from siglip_train.interop.names import translate
from siglip_train.interop.native import Description, ModelFiles, stored_rules, tokenizer_in
from siglip_train.models.layers import LAYER_NORM_EPS, Gelu
from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig

MODEL_TYPES = ("siglip", "siglip2")

_GELUS: dict[str, Gelu] = {"gelu_pytorch_tanh": "tanh", "gelu": "erf"}
_RESIZES: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
_SIGLIP_2_VOCABULARY = 256000


def read_huggingface(folder: Path) -> ModelFiles:
    """Read `config.json`, the weights (one file or several), and what there is of tokenizer and preprocessor.

    Without preprocessor_config.json, images are resized as that model type does: bicubic, NaFlex bilinear.
    Raises `UserError` for a model that differs from SigLIP, or tensors that do not fit the config.
    """
    content = read_json(folder / "config.json")
    tensors = read_tensors(folder / "model.safetensors")
    # a buffer in files of older transformers
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    config = _config(content, "text_model.head.weight" in tensors, where=folder / "config.json")
    description = Description(
        config,
        tokenizer=tokenizer_in(folder),
        rules=stored_rules(folder) or _rules(folder, config),
        resize=_resize(folder, content),
        origin="huggingface",
    )
    return ModelFiles(description, translate(tensors, config, "huggingface", where=folder))


def _config(content: Mapping[str, Any], projection: bool, *, where: Path) -> SiglipConfig:  # noqa: FBT001
    vision, text = content.get("vision_config", {}), content.get("text_config", {})
    for name in content.get("architectures") or ():
        if "Classification" in name:
            raise UserError(
                f"{where}: a {name} has no text tower; give the image-text model it was made from"
            )
    if not vision.get("vision_use_head", True):
        raise UserError(f"{where}: vision_use_head is false, so this is no image-text model")
    patch_size = vision.get("patch_size", 16)
    # a NaFlex model has a table of positions but no image size
    grid = math.isqrt(vision.get("num_patches", 256)) if content["model_type"] == "siglip2" else None
    config = SiglipConfig(
        VisionConfig(
            image_size=grid * patch_size if grid else vision.get("image_size", 224),
            patch_size=patch_size,
            position_grid=grid,
            **_sizes(vision, where),
        ),
        TextConfig(
            context_length=text.get("max_position_embeddings", 64),
            vocab_size=text.get("vocab_size", 32000),
            projection=projection,
            **_sizes(text, where),
        ),
    )
    embedding = text.get("projection_size") or config.text.width
    if projection and embedding != config.vision.width:
        raise UserError(
            f"{where}: text projection_size {embedding} is not the vision hidden_size {config.vision.width}"
        )
    return config


def _sizes(tower: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Fields both towers have; those a config leaves out have transformers' defaults."""
    activation = tower.get("hidden_act", "gelu_pytorch_tanh")
    if activation not in _GELUS:
        raise UserError(f"{where}: hidden_act {activation} is not supported, only {', '.join(_GELUS)}")
    epsilon = tower.get("layer_norm_eps", LAYER_NORM_EPS)
    if not math.isclose(epsilon, LAYER_NORM_EPS):
        raise UserError(f"{where}: layer_norm_eps {epsilon} is not supported, only {LAYER_NORM_EPS}")
    return {
        "width": tower.get("hidden_size", 768),
        "depth": tower.get("num_hidden_layers", 12),
        "mlp_dim": tower.get("intermediate_size", 3072),
        "heads": tower.get("num_attention_heads", 12),
        "gelu": _GELUS[activation],
    }


def _rules(folder: Path, config: SiglipConfig) -> TextRules:
    """SigLIP 1: no punctuation, padded with EOS. SigLIP 2 (Gemma's tokenizer): padded with <pad>."""
    path = folder / "tokenizer_config.json"
    name = read_json(path).get("tokenizer_class", "") if path.is_file() else ""
    is_siglip_2 = "gemma" in name.lower() or name.startswith("Siglip2")
    if is_siglip_2 or (not name and config.text.vocab_size == _SIGLIP_2_VOCABULARY):
        return TextRules()
    return TextRules(strip_punctuation=True, pad="eos")


def _resize(folder: Path, content: Mapping[str, Any]) -> Literal["bilinear", "bicubic"]:
    path = folder / "preprocessor_config.json"
    preprocessor = read_json(path) if path.is_file() else {}
    for key in ("image_mean", "image_std"):
        if any(value != 0.5 for value in preprocessor.get(key) or ()):
            raise UserError(f"{path}: {key} {preprocessor[key]} is not supported, only 0.5")
    default = 2 if content["model_type"] == "siglip2" else 3
    filter_number = preprocessor.get("resample", default)
    if filter_number not in _RESIZES:
        raise UserError(
            f"{path}: resample {filter_number} is not supported, only 2 (bilinear) and 3 (bicubic)"
        )
    return _RESIZES[filter_number]
