"""Read a HuggingFace folder of a SigLIP model (model_type siglip) or a SigLIP 2 NaFlex model (siglip2)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.interop.files import read_json, read_tensors, section
from siglip_train.interop.names import translate
from siglip_train.interop.native import Description, ModelFiles, Resize, stored_rules, tokenizer_in
from siglip_train.models.layers import LAYER_NORM_EPS, Gelu
from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig

# the image-text class of each; SigLIP 2 of a fixed resolution is siglip as well
_CLASSES = {"siglip": "SiglipModel", "siglip2": "Siglip2Model"}
MODEL_TYPES = tuple(_CLASSES)
_STEM = "vision_model.embeddings.patch_embedding.weight"

_GELUS: dict[str, Gelu] = {"gelu_pytorch_tanh": "tanh", "gelu": "erf"}
_RESIZES: dict[int, Resize] = {2: "bilinear", 3: "bicubic"}
_SIGLIP_2_VOCABULARY = 256000


@dataclass
class _Tower:
    """What both towers have; here and below, what a config leaves out has transformers' defaults."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = LAYER_NORM_EPS


@dataclass
class _Vision(_Tower):
    """num_patches: of a NaFlex model, which has a table of positions but no image size."""

    image_size: int = 224
    patch_size: int = 16
    num_patches: int = 256
    vision_use_head: bool = True


@dataclass
class _Text(_Tower):
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    projection_size: int | None = None


@dataclass
class _Model:
    """config.json."""

    model_type: str
    architectures: list[str] | None = None
    vision_config: Any = field(default_factory=dict)
    text_config: Any = field(default_factory=dict)


@dataclass
class _Preprocessor:
    """preprocessor_config.json."""

    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    resample: int | None = None


@dataclass
class _TokenizerConfig:
    """tokenizer_config.json."""

    tokenizer_class: str | None = None


def read_huggingface(folder: Path, skip: Sequence[str] = ()) -> ModelFiles:
    """Read `config.json`, the weights (one file or several), and what there is of tokenizer and preprocessor.

    Without preprocessor_config.json, images are resized as that model type does: bicubic, NaFlex bilinear. skip: as
    `translate` takes it.
    Raises `UserError` for a model that differs from SigLIP, or tensors that do not fit the config.
    """
    where = folder / "config.json"
    content = section(_Model, read_json(where), where)
    tensors = read_tensors(folder / "model.safetensors")
    # a buffer in files of older transformers
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    _check_class(content, tensors, where)
    config = _config(content, "text_model.head.weight" in tensors, where=where)
    description = Description(
        config,
        tokenizer=tokenizer_in(folder),
        rules=stored_rules(folder) or _rules(folder, config),
        resize=_resize(folder, content.model_type),
        origin="huggingface",
    )
    return ModelFiles(description, translate(tensors, config, "huggingface", where=folder, skip=skip))


def _check_class(content: _Model, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuse what transformers refuses: another class, or a stem of patches that the class does not have."""
    expected = _CLASSES[content.model_type]
    for name in content.architectures or ():
        if name != expected:
            raise UserError(
                f"{where}: a {name} is not {expected}, the image-text model of model_type {content.model_type}; "
                "give the model it was made from, or correct the file"
            )
    stem = tensors.get(_STEM)
    dimensions, kind = (2, "linear") if content.model_type == "siglip2" else (4, "a convolution")
    if stem is not None and stem.ndim != dimensions:
        other = next(name for name in MODEL_TYPES if name != content.model_type)
        raise UserError(
            f"{where}: model_type is {content.model_type}, whose stem of patches is {kind}, but {_STEM} is "
            f"{list(stem.shape)}, as in {other}"
        )


def _config(content: _Model, projection: bool, *, where: Path) -> SiglipConfig:  # noqa: FBT001
    vision = section(_Vision, content.vision_config, where, "vision_config")
    text = section(_Text, content.text_config, where, "text_config")
    if not vision.vision_use_head:
        raise UserError(f"{where}: vision_use_head is false, so this is no image-text model")
    grid = math.isqrt(max(0, vision.num_patches)) if content.model_type == "siglip2" else None
    config = SiglipConfig(
        VisionConfig(
            image_size=vision.image_size if grid is None else grid * vision.patch_size,
            patch_size=vision.patch_size,
            position_grid=grid,
            **_sizes(vision, where),
        ),
        TextConfig(
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            projection=projection,
            **_sizes(text, where),
        ),
    )
    embedding = text.projection_size or config.text.width
    if projection and embedding != config.vision.width:
        raise UserError(
            f"{where}: text projection_size {embedding} is not the vision hidden_size {config.vision.width}"
        )
    return config


def _sizes(tower: _Tower, where: Path) -> dict[str, Any]:
    """Fields both towers have, under our names."""
    if tower.hidden_act not in _GELUS:
        raise UserError(f"{where}: hidden_act {tower.hidden_act} is not supported, only {', '.join(_GELUS)}")
    if not math.isclose(tower.layer_norm_eps, LAYER_NORM_EPS):
        raise UserError(
            f"{where}: layer_norm_eps {tower.layer_norm_eps} is not supported, only {LAYER_NORM_EPS}"
        )
    return {
        "width": tower.hidden_size,
        "depth": tower.num_hidden_layers,
        "mlp_dim": tower.intermediate_size,
        "heads": tower.num_attention_heads,
        "gelu": _GELUS[tower.hidden_act],
    }


def _rules(folder: Path, config: SiglipConfig) -> TextRules:
    """SigLIP 1: no punctuation, padded with EOS. SigLIP 2 (Gemma's tokenizer): padded with <pad>."""
    path = folder / "tokenizer_config.json"
    content = section(_TokenizerConfig, read_json(path), path) if path.is_file() else _TokenizerConfig()
    name = content.tokenizer_class or ""
    is_siglip_2 = "gemma" in name.lower() or name.startswith("Siglip2")
    if is_siglip_2 or (not name and config.text.vocab_size == _SIGLIP_2_VOCABULARY):
        return TextRules()
    return TextRules(strip_punctuation=True, pad="eos")


def _resize(folder: Path, model_type: str) -> Resize:
    path = folder / "preprocessor_config.json"
    preprocessor = section(_Preprocessor, read_json(path), path) if path.is_file() else _Preprocessor()
    for key in ("image_mean", "image_std"):
        values = getattr(preprocessor, key) or []
        if any(value != 0.5 for value in values):
            raise UserError(f"{path}: {key} {values} is not supported, only 0.5")
    default = 2 if model_type == "siglip2" else 3
    filter_number = default if preprocessor.resample is None else preprocessor.resample
    if filter_number not in _RESIZES:
        raise UserError(
            f"{path}: resample {filter_number} is not supported, only 2 (bilinear) and 3 (bicubic)"
        )
    return _RESIZES[filter_number]
