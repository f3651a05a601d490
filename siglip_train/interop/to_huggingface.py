"""Write a model as a HuggingFace folder: whole, the vision tower, or that with a classifier; and ask transformers."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip_train.errors import UserError
from siglip_train.interop.files import read_json, write_tensors
from siglip_train.interop.names import translate_back
from siglip_train.interop.native import Description
from siglip_train.interop.probe import Answers, Probe
from siglip_train.models.layers import LAYER_NORM_EPS
from siglip_train.models.siglip import SiglipConfig, normalize
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from siglip_train.objectives.classification import Classification

_ACTIVATIONS = {"tanh": "gelu_pytorch_tanh", "erf": "gelu"}
_RESIZES = {"bilinear": 2, "bicubic": 3}
_TOKENIZER_CONFIG = "tokenizer_config.json"
# what an error says where somebody loads the folder with trust_remote_code
_NO_CODE = "there_is_no_code_here_load_it_without_trust_remote_code.Tokenizer"


def write_huggingface(folder: Path, state: Mapping[str, Tensor], description: Description) -> list[str]:
    """Write weights and configs, beside a tokenizer that is there already; gives back the tensors that are made up.

    The class is SiglipModel, or with a table of positions read at any grid (NaFlex) Siglip2Model.
    """
    config = description.config
    _check_fits(config)
    tensors = translate_back(state, config, "huggingface")
    made_up = [] if config.text.projection else _identity_head(tensors, config)
    content = {
        "architectures": [f"{family(config)}Model"],
        "model_type": family(config).lower(),
        "dtype": "float32",
        "vision_config": _vision(config.vision),
        "text_config": _text(config),
    }
    _write(folder, tensors, content, description)
    if (folder / _TOKENIZER_CONFIG).is_file():
        _tell_processor(folder, config.vision)
        _write_sentence_transformers(folder)
    return made_up


def write_vision_tower(folder: Path, state: Mapping[str, Tensor], description: Description) -> list[str]:
    """Write the vision tower alone, as SiglipVisionModel or Siglip2VisionModel."""
    config = description.config
    _check_fits(config)
    tensors = translate_back(state, config, "huggingface")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    content = {
        "architectures": [f"{family(config)}VisionModel"],
        "dtype": "float32",
        **_vision(config.vision),
    }
    _write(folder, tensors, content, description)
    return []


def write_classifier(
    folder: Path,
    state: Mapping[str, Tensor],
    description: Description,
    *,
    head: Classification,
    class_names: Sequence[str] | None,
) -> list[str]:
    """Write the vision tower with `head`, as SiglipForImageClassification or Siglip2ForImageClassification.

    class_names: in label order, None = `LABEL_i`. Raises `UserError` for another number of them than the head has
    classes, and for a head that reads anything but the average of the tokens, which is all that these classes do.
    """
    config = description.config
    _check_averages(config, head)
    if class_names is None:
        class_names = [f"LABEL_{label}" for label in range(head.classes)]
    if len(class_names) != head.classes:
        raise UserError(f"there are {len(class_names)} class names, but the head has {head.classes} classes")
    tensors = translate_back(state, config, "huggingface")
    unused = ("text_model.", "vision_model.head.", "logit_")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    content = {
        "architectures": [f"{family(config)}ForImageClassification"],
        "model_type": family(config).lower(),
        "dtype": "float32",
        "vision_config": {**_vision(config.vision), "vision_use_head": False},
        # transformers counts num_labels by these
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
    }
    _write(folder, tensors | head.state_dict(), content, description)
    return []


def keep_tokenizer(folder: Path) -> None:
    """Let transformers open the tokenizer in `folder` as it is written.

    Beside a config of siglip2, transformers (5.23, not 5.10) builds one anew from the vocabulary alone, with a
    normalizer of its own, unless the tokenizer claims to come with code, which without `trust_remote_code` it ignores.
    """
    path = folder / _TOKENIZER_CONFIG
    _write_json(path, read_json(path) | {"auto_map": {"AutoTokenizer": [_NO_CODE, None]}})


def family(config: SiglipConfig) -> str:
    """The beginning of transformers' class names for this model."""
    return "Siglip" if config.vision.position_grid is None else "Siglip2"


def transformers_answers(folder: Path, probe: Probe, config: SiglipConfig) -> Answers | None:
    """The probe's embeddings by transformers, from the files in `folder`; None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    with _quiet(transformers), torch.inference_mode():
        model = transformers.AutoModel.from_pretrained(folder).eval()
        inputs = _image_inputs(probe, config)
        if not hasattr(model, "logit_scale"):
            return {"image_embedding": normalize(model(**inputs).pooler_output)}
        output = model(input_ids=probe.tokens, **inputs)
    return {"image_embedding": output.image_embeds, "text_embedding": output.text_embeds}


def transformers_logits(folder: Path, probe: Probe, config: SiglipConfig) -> Answers | None:
    """What transformers' classifier in `folder` says of the probe's images; None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    with _quiet(transformers), torch.inference_mode():
        model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        return {"logits": model(**_image_inputs(probe, config)).logits}


def transformers_tokens(folder: Path, probe: Probe) -> Tensor | None:
    """The probe's texts as tokens of transformers' tokenizer in `folder`; None where there is none to ask."""
    if not probe.texts or importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    length = probe.tokens.shape[1]
    rows = tokenizer(probe.texts, padding="max_length", truncation=True, max_length=length)
    return torch.tensor(rows["input_ids"])


def _image_inputs(probe: Probe, config: SiglipConfig) -> dict[str, Tensor]:
    if config.vision.position_grid is None:
        return {"pixel_values": probe.pixels}
    patches, grid = probe.images.patches, probe.images.grid
    return {
        "pixel_values": patches / 127.5 - 1,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int64),
        "spatial_shapes": grid.amax(dim=1) + 1,
    }


class _quiet:  # noqa: N801 a context manager, read as a verb
    """transformers draws progress bars for a file of any size, and warns of ids that its defaults brought."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._was_on = self._logging.is_progress_bar_enabled()
        self._verbosity = self._logging.get_verbosity()
        self._logging.disable_progress_bar()
        self._logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._verbosity)
        if self._was_on:
            self._logging.enable_progress_bar()


def _check_fits(config: SiglipConfig) -> None:
    if config.vision.pool != "map":
        raise UserError(
            f"model.vision.pool is {config.vision.pool}; HuggingFace's SigLIP has the MAP head only"
        )


def _check_averages(config: SiglipConfig, head: Classification) -> None:
    where = f"model.vision.pool is {config.vision.pool}"
    if head.features == "pooled" and config.vision.pool != "average":
        raise UserError(
            f"the head reads what the vision tower has pooled (features: pooled, {where}), HuggingFace's class the "
            "average of the tokens: train one with features=tokens"
        )
    if config.vision.pool == "cls":
        raise UserError(f"{where}; HuggingFace's SigLIP has no class token")


def _vision(vision: VisionConfig) -> dict[str, Any]:
    extent = (
        {"model_type": "siglip_vision_model", "image_size": vision.image_size}
        if vision.position_grid is None
        else {"model_type": "siglip2_vision_model", "num_patches": vision.position_grid**2}
    )
    return {**extent, "patch_size": vision.patch_size, "num_channels": 3, **_sizes(vision)}


def _text(config: SiglipConfig) -> dict[str, Any]:
    text = config.text
    return {
        "model_type": f"{family(config).lower()}_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "projection_size": config.vision.width,
        # the defaults are ids of another model; nothing in SigLIP depends on them
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **_sizes(text),
    }


def _sizes(tower: VisionConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": _ACTIVATIONS[tower.gelu],
        "layer_norm_eps": LAYER_NORM_EPS,
        "attention_dropout": 0.0,
    }


def _identity_head(tensors: dict[str, Tensor], config: SiglipConfig) -> list[str]:
    """transformers' text tower always has a projection: one that changes nothing."""
    width = config.text.width
    made_up = {"text_model.head.weight": torch.eye(width), "text_model.head.bias": torch.zeros(width)}
    tensors.update(made_up)
    return list(made_up)


def _write(
    folder: Path, tensors: Mapping[str, Tensor], content: dict[str, Any], description: Description
) -> None:
    # without this note, transformers refuses the file
    write_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vision = description.config.vision
    processor: dict[str, Any] = {
        "image_processor_type": f"{family(description.config)}ImageProcessor",
        "processor_class": f"{family(description.config)}Processor",
        "do_resize": True,
        "resample": _RESIZES[description.resize],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": True,
    }
    if vision.position_grid is None:
        processor["size"] = {"height": vision.image_size, "width": vision.image_size}
    else:
        processor |= {"patch_size": vision.patch_size, "max_num_patches": vision.position_grid**2}
    _write_json(folder / "config.json", content)
    _write_json(folder / "preprocessor_config.json", processor)


def _tell_processor(folder: Path, vision: VisionConfig) -> None:
    """Bring the sizes of a NaFlex model to Siglip2Processor.

    It has defaults of its own for them, which win over the file of the image processor, but not over the tokenizer's.
    """
    if vision.position_grid is None:
        return
    path = folder / _TOKENIZER_CONFIG
    sizes = {"patch_size": vision.patch_size, "max_num_patches": vision.position_grid**2}
    _write_json(path, read_json(path) | sizes)


def _write_sentence_transformers(folder: Path) -> None:
    """Two files that sentence-transformers alone reads: texts padded to the full length, embeddings of unit norm.

    Without them it pads to the longest text of a batch, and the text tower, which reads the last position, gives
    something else, in silence.
    """
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate((("Transformer", ""), ("Normalize", "1_Normalize")))
    ]
    parts = {
        part: {"method": f"get_{part}_features", "method_output_name": "pooler_output"}
        for part in ("text", "image")
    }
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": parts,
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": {"padding": "max_length"}},
    }
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", settings)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
