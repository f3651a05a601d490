"""Read a HuggingFace folder of a SigLIP model (model_type siglip) or a SigLIP 2 NaFlex model (siglip2).

Also of an image tower alone (SiglipVisionModel) or with a classifier, from which a training can start.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.interop.files import read_json, read_shapes, read_tensors, section
from siglip_train.interop.names import translate
from siglip_train.interop.native import (
    Description,
    ModelFiles,
    Resize,
    check_absent,
    stored_rules,
    tokenizer_in,
)
from siglip_train.models.layers import LAYER_NORM_EPS, Gelu
from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig

T = TypeVar("T")

# what the classes that are read lack of ours: SigLIP 2 of a fixed resolution is siglip as well
_TOWER = ("text.", "logit_")
_ABSENT = {
    "Model": (),
    "VisionModel": _TOWER,
    "ForImageClassification": _TOWER,
}
_FAMILIES = {"siglip": "Siglip", "siglip2": "Siglip2"}
# a tower alone has its fields at the top of its config
_VISION_TYPES = {f"{family}_vision_model": family for family in _FAMILIES}
MODEL_TYPES = (*_FAMILIES, *_VISION_TYPES)
_VISION = "vision_model."
_STEM = f"{_VISION}embeddings.patch_embedding.weight"
_POOL = "vision.pool."
CLASSIFIER = "classifier."

_GELUS: dict[str, Gelu] = {"gelu_pytorch_tanh": "tanh", "gelu": "erf"}
_RESIZES: dict[int, Resize] = {2: "bilinear", 3: "bicubic"}
_SIGLIP_2_VOCABULARY = 256000
# what transformers calls a tokenizer.json whose own class it does not need
_GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


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
    """preprocessor_config.json, or what transformers 5 puts into processor_config.json instead."""

    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    resample: int | None = None
    do_normalize: bool | None = None


@dataclass
class _Processor:
    """processor_config.json."""

    image_processor: dict[str, Any] | None = None


@dataclass
class _TokenizerConfig:
    """tokenizer_config.json; a token is its text, or an object that has it."""

    tokenizer_class: str | None = None
    eos_token: Any = None
    pad_token: Any = None


def check_model_type(folder: Path) -> None:
    """Raise a `UserError` that says what the folder holds, unless it is one of `MODEL_TYPES`."""
    where = folder / "config.json"
    config = read_json(where)
    model_type = config.get("model_type")
    if model_type in MODEL_TYPES:
        return
    inside = config.get("vision_config")
    tower = inside.get("model_type") if isinstance(inside, dict) else config.get("mm_vision_tower")
    if tower in _VISION_TYPES or "siglip" in str(tower).lower():
        raise UserError(
            f"{folder} is a whole {model_type} with a language model, of which {tower} is the image tower: save that "
            "alone with transformers, AutoModel.from_pretrained(…).vision_tower.save_pretrained(TOWER), and give TOWER"
        )
    raise UserError(f"{folder}: model_type {model_type} is not supported, only {', '.join(MODEL_TYPES)}")


def read_huggingface(folder: Path, skip: Sequence[str] = ()) -> ModelFiles:
    """Read `config.json`, the weights (one file or several), and what there is of tokenizer and preprocessor.

    Without a preprocessor, images are resized as that model type does: bicubic, NaFlex bilinear. skip: as `translate`
    takes it; of an image tower alone it must name what that lacks.
    Raises `UserError` for a model that differs from SigLIP, or tensors that do not fit the config.
    """
    description = describe_huggingface(folder)
    check_absent(description, folder, skip)
    tensors = read_tensors(folder / "model.safetensors")
    # a buffer in files of older transformers; the labels of a classifier are its own
    left = [name for name in tensors if name.endswith(".position_ids") or name.startswith(_left(description))]
    tensors = _prefixed({name: tensor for name, tensor in tensors.items() if name not in left})
    return ModelFiles(
        description, translate(tensors, description.config, "huggingface", where=folder, skip=skip)
    )


def _left(description: Description) -> tuple[str, ...]:
    return (CLASSIFIER,) if description.absent else ()


def _prefixed(tensors: Mapping[str, T]) -> dict[str, T]:
    """The names of a tower alone as they are in a whole model, which is how transformers before 5 wrote them too."""
    start = "" if _STEM.removeprefix(_VISION) not in tensors else _VISION
    return {start + name: tensor for name, tensor in tensors.items()}


def describe_huggingface(folder: Path) -> Description:
    """Everything but the weights of such a folder; of those, names and shapes are read."""
    where = folder / "config.json"
    values = read_json(where)
    if values.get("model_type") in _VISION_TYPES:
        values = {**values, "model_type": _VISION_TYPES[values["model_type"]], "vision_config": values}
        values.setdefault("architectures", [f"{_FAMILIES[values['model_type']]}VisionModel"])
    content = section(_Model, values, where)
    shapes = _prefixed(read_shapes(folder / "model.safetensors"))
    absent = _absent(content, where)
    _check_names(content, shapes, where)
    config, rules = _tower_config(content, where), TextRules()
    if not absent:
        config = _with_text(config, content, where, projection="text_model.head.weight" in shapes)
        rules = _rules(folder, config)
    return Description(
        config,
        tokenizer=tokenizer_in(folder),
        rules=stored_rules(folder) or rules,
        resize=_resize(folder, content.model_type),
        origin="huggingface",
        absent=absent,
    )


def _absent(content: _Model, where: Path) -> tuple[str, ...]:
    """What the class of the folder lacks. Raises `UserError` for a class that is not read."""
    family = _FAMILIES[content.model_type]
    name = (content.architectures or [f"{family}Model"])[0]
    has_head = section(_Vision, content.vision_config, where, "vision_config").vision_use_head
    for kind, absent in _ABSENT.items():
        if name == family + kind:
            return absent if has_head else (*absent, _POOL)
    raise UserError(
        f"{where}: a {name} is not {family}Model, the image-text model of model_type {content.model_type}, nor its "
        "image tower or classifier; give the model it was made from, or correct the file"
    )


def _check_names(content: _Model, shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Refuse a tower under the names of a larger model, and a stem of patches that the class does not have."""
    stem = _STEM.removeprefix(_VISION)
    inside = next((name for name in shapes if name.endswith(f".{stem}") and name != _STEM), None)
    if inside is not None:
        raise UserError(
            f"{where.parent}: its tensors are called {inside.removesuffix(stem)}…, as in a dump of a larger model "
            "(PaliGemma, LLaVA): save the tower alone with transformers, as model.vision_tower.save_pretrained(TOWER)"
        )
    shape = shapes.get(_STEM)
    dimensions, kind = (2, "linear") if content.model_type == "siglip2" else (4, "a convolution")
    if shape is not None and len(shape) != dimensions:
        other = next(name for name in _FAMILIES if name != content.model_type)
        raise UserError(
            f"{where}: model_type is {content.model_type}, whose stem of patches is {kind}, but {_STEM} is "
            f"{list(shape)}, as in {other}"
        )


def _tower_config(content: _Model, where: Path) -> SiglipConfig:
    vision = section(_Vision, content.vision_config, where, "vision_config")
    grid = math.isqrt(max(0, vision.num_patches)) if content.model_type == "siglip2" else None
    image_size = vision.image_size if grid is None else grid * vision.patch_size
    tower = VisionConfig(
        image_size=image_size, patch_size=vision.patch_size, position_grid=grid, **_sizes(vision, where)
    )
    return SiglipConfig(tower)


def _with_text(config: SiglipConfig, content: _Model, where: Path, *, projection: bool) -> SiglipConfig:
    text = section(_Text, content.text_config, where, "text_config")
    config = SiglipConfig(
        config.vision,
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
    """SigLIP 1: no punctuation, padded with EOS. SigLIP 2 (Gemma's tokenizer): padded with <pad>.

    Where the class is one of transformers' generic ones, the declared tokens decide: SigLIP's pads with its EOS.
    """
    path = folder / "tokenizer_config.json"
    content = section(_TokenizerConfig, read_json(path), path) if path.is_file() else _TokenizerConfig()
    name = content.tokenizer_class or ""
    is_siglip_2 = "gemma" in name.lower() or name.startswith("Siglip2")
    if name in _GENERIC_TOKENIZERS:
        pad, eos = _text_of(content.pad_token), _text_of(content.eos_token)
        is_siglip_2 = pad != eos if pad else config.text.vocab_size == _SIGLIP_2_VOCABULARY
    if is_siglip_2 or (not name and config.text.vocab_size == _SIGLIP_2_VOCABULARY):
        return TextRules()
    return TextRules(strip_punctuation=True, pad="eos")


def _text_of(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _resize(folder: Path, model_type: str) -> Resize:
    path, preprocessor = _preprocessor(folder)
    for key in ("image_mean", "image_std"):
        values = getattr(preprocessor, key) or []
        if any(value != 0.5 for value in values):
            raise UserError(f"{path}: {key} {values} is not supported, only 0.5")
    if preprocessor.do_normalize is False:
        raise UserError(f"{path}: do_normalize false is not supported, only image_mean and image_std 0.5")
    default = 2 if model_type == "siglip2" else 3
    filter_number = default if preprocessor.resample is None else preprocessor.resample
    if filter_number not in _RESIZES:
        raise UserError(
            f"{path}: resample {filter_number} is not supported, only 2 (bilinear) and 3 (bicubic)"
        )
    return _RESIZES[filter_number]


def _preprocessor(folder: Path) -> tuple[Path, _Preprocessor]:
    """As transformers finds it: what is nested in processor_config.json comes before a file of its own."""
    path = folder / "processor_config.json"
    nested = section(_Processor, read_json(path), path).image_processor if path.is_file() else None
    if nested is not None:
        return path, section(_Preprocessor, nested, path, "image_processor")
    path = folder / "preprocessor_config.json"
    return path, section(_Preprocessor, read_json(path), path) if path.is_file() else _Preprocessor()
