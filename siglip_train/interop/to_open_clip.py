"""Write a model as an open_clip folder, and ask open_clip what it makes of it.

open_clip knows a vision tower by timm's name for it. A size or GELU without a name of its own gets a folder `trunk`
that describes it to timm; its name is then a full path, so such a folder is to be converted again rather than moved.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip_train.errors import UserError
from siglip_train.interop.files import read_json, write_tensors
from siglip_train.interop.names import translate_back
from siglip_train.interop.native import Description, tokenizer_in
from siglip_train.interop.open_clip import CONFIG_FILE, TRUNK, WEIGHTS_FILE, timm_name, trunk_path
from siglip_train.interop.probe import Answers, Probe
from siglip_train.models.layers import LAYER_NORM_EPS
from siglip_train.models.siglip import SiglipConfig, normalize
from siglip_train.models.vision import VisionConfig

# any of timm's SigLIP towers: every size of it is overridden
_ARCHITECTURE = "vit_base_patch16_siglip_224"
_ACTIVATIONS = {"tanh": "gelu_tanh", "erf": "gelu"}


def write_open_clip(folder: Path, state: Mapping[str, Tensor], description: Description) -> list[str]:
    """Write weights and `open_clip_config.json`; the tokenizer, if any, has to be there already.

    Raises `UserError` for what open_clip has no form of: NaFlex, and other pools than MAP.
    """
    config = description.config
    _check_fits(config)
    write_tensors(translate_back(state, config, "open_clip"), folder / WEIGHTS_FILE)
    name = timm_name(config.vision)
    if name is None:
        _write_trunk(folder / TRUNK, config.vision)
        name = trunk_path(folder)
    content = {
        "model_cfg": {
            "embed_dim": config.vision.width,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": config.vision.image_size,
                "timm_model_name": name,
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": _text(config, has_tokenizer=tokenizer_in(folder) is not None),
        },
        "preprocess_cfg": {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": description.resize,
            "resize_mode": "squash",
        },
    }
    _write_json(folder / CONFIG_FILE, content)
    return []


def relocate(folder: Path, home: Path) -> None:
    """Let the config name the trunk at `home`, where `folder` is about to be moved."""
    content = read_json(folder / CONFIG_FILE)
    vision = content["model_cfg"]["vision_cfg"]
    if vision["timm_model_name"] == trunk_path(folder):
        vision["timm_model_name"] = trunk_path(home)
        _write_json(folder / CONFIG_FILE, content)


def open_clip_answers(folder: Path, probe: Probe) -> Answers | None:
    """The probe's embeddings by open_clip, from the files in `folder`; None where it is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        return None
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder.resolve()}").eval()
    with torch.inference_mode():
        return {
            "image_embedding": normalize(model.encode_image(probe.pixels)),
            "text_embedding": normalize(model.encode_text(probe.tokens)),
        }


def open_clip_tokens(folder: Path, probe: Probe) -> Tensor | None:
    """The probe's texts as open_clip's tokens, which need transformers; None where there is none to ask."""
    if not probe.texts or any(
        importlib.util.find_spec(name) is None for name in ("open_clip", "transformers")
    ):
        return None
    import open_clip

    return open_clip.get_tokenizer(f"local-dir:{folder.resolve()}")(probe.texts)


def _check_fits(config: SiglipConfig) -> None:
    if config.vision.position_grid is not None:
        raise UserError("open_clip has no SigLIP model for variable grids (NaFlex); convert --to hf instead")
    if config.vision.pool != "map":
        raise UserError(
            f"model.vision.pool is {config.vision.pool}; open_clip's SigLIP has the MAP head only"
        )


def _text(config: SiglipConfig, *, has_tokenizer: bool) -> dict[str, Any]:
    text = config.text
    content: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "mlp_ratio": _ratio(text.mlp_dim, text.width),
        "no_causal_mask": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": LAYER_NORM_EPS},
        **({"proj_bias": True} if text.projection else {"proj_type": "none"}),
        **({"act_kwargs": {"approximate": "tanh"}} if text.gelu == "tanh" else {}),
    }
    if has_tokenizer:
        # a name is asked for, the folder is used; case and punctuation are the tokenizer's own business
        content |= {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"clean": "whitespace"}}
    return content


def _write_trunk(folder: Path, vision: VisionConfig) -> None:
    folder.mkdir()
    content = {
        "architecture": _ARCHITECTURE,
        "num_classes": 0,
        "global_pool": "map",
        "model_args": {
            "img_size": vision.image_size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.width,
            "depth": vision.depth,
            "num_heads": vision.heads,
            "mlp_ratio": _ratio(vision.mlp_dim, vision.width),
            "act_layer": _ACTIVATIONS[vision.gelu],
        },
        "pretrained_cfg": {
            "input_size": [3, vision.image_size, vision.image_size],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "num_classes": 0,
        },
    }
    _write_json(folder / "config.json", content)


def _ratio(mlp_dim: int, width: int) -> float:
    """A ratio from which cutting `ratio * width` gives `mlp_dim` again."""
    return mlp_dim / width if int(width * (mlp_dim / width)) == mlp_dim else (mlp_dim + 0.5) / width


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
