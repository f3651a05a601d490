"""open_clip folders: the outputs of open_clip, the towers of its own configs, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from siglip_train.errors import UserError
from siglip_train.interop.files import section
from siglip_train.interop.open_clip import (
    WEIGHTS_FILE,
    Text,
    Vision,
    _text_config,
    _vision_config,
    read_open_clip,
)
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.vision import VisionConfig, patchify
from tests.goldens import arrays, golden_folder

NAME = "open_clip_b8_i32"
VARIANTS = {
    "tiny-SigLIP": ("erf", "erf"),
    "tiny-SigLIP2": ("erf", "tanh"),
    "tiny-SigLIP2-tanh": ("tanh", "tanh"),
}


def vision_of(gelu: str) -> VisionConfig:
    """The timm name of these models is invented, so their sizes have to be given."""
    return VisionConfig(
        image_size=32,
        patch_size=8,
        width=64,
        depth=3,
        mlp_dim=192,
        heads=4,
        gelu=gelu,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs_equal_open_clip(variant: str) -> None:
    vision_gelu, text_gelu = VARIANTS[variant]
    files = read_open_clip(golden_folder(NAME) / f"{variant}.json", vision=vision_of(vision_gelu))
    assert files.description.config.text.gelu == text_gelu
    model = Siglip(files.description.config)
    model.load_state_dict(files.state)
    inputs, expected = arrays(NAME, "inputs.npz"), arrays(NAME, f"expected_f32_{variant}.npz")
    pixels = torch.from_numpy(inputs["pixel_values"])
    image = model.encode_image(pixels)

    def close(ours: torch.Tensor, key: str, atol: float) -> None:
        torch.testing.assert_close(ours, torch.from_numpy(expected[key]), rtol=0, atol=atol, msg=key)

    features = model.vision(*patchify(pixels, 8))
    close(features.tokens, "trunk_forward_features", 2e-5)
    close(features.pooled, "image_features", 1.5e-5)
    close(image, "image_features_norm", 2e-6)
    for case in ("full", "pad"):
        tokens = torch.from_numpy(inputs[f"input_ids_{case}"])
        features = model.text(tokens)
        close(features.tokens, f"{case}/text_tokens_ln_final", 2e-5)
        close(features.pooled, f"{case}/text_features", 1.5e-5)
        text = model.encode_text(tokens)
        close(text, f"{case}/text_features_norm", 2e-6)
        logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
        close(logits, f"{case}/logits_per_image", 2e-5)


def test_the_wrong_gelu_is_visible() -> None:
    """Otherwise the comparison above would not tell the three variants apart."""
    expected = arrays(NAME, "expected_f32_tiny-SigLIP.npz")
    files = read_open_clip(golden_folder(NAME) / "tiny-SigLIP.json", vision=vision_of("tanh"))
    model = Siglip(files.description.config)
    model.load_state_dict(files.state)
    image = model.encode_image(torch.from_numpy(arrays(NAME, "inputs.npz")["pixel_values"])).detach()
    assert (image - torch.from_numpy(expected["image_features_norm"])).abs().max() > 1e-5


# vision GELU as timm names it, width, depth, mlp_dim, patch, image size; text GELU, context, vocabulary, projection
RELEASED = {
    "ViT-B-16-SigLIP": (("erf", 768, 12, 3072, 16, 224), ("erf", 64, 32000, True)),
    "ViT-B-16-SigLIP-i18n-256": (("erf", 768, 12, 3072, 16, 256), ("erf", 64, 250000, True)),
    "ViT-L-16-SigLIP-384": (("erf", 1024, 24, 4096, 16, 384), ("erf", 64, 32000, True)),
    "ViT-SO400M-14-SigLIP": (("erf", 1152, 27, 4304, 14, 224), ("erf", 16, 32000, True)),
    "ViT-SO400M-16-SigLIP-i18n-256": (("tanh", 1152, 27, 4304, 16, 256), ("erf", 64, 250000, False)),
    "ViT-B-32-SigLIP2-256": (("tanh", 768, 12, 3072, 32, 256), ("tanh", 64, 256000, True)),
    "ViT-B-16-SigLIP2-384": (("erf", 768, 12, 3072, 16, 384), ("tanh", 64, 256000, True)),
    "ViT-L-16-SigLIP2-512": (("tanh", 1024, 24, 4096, 16, 512), ("tanh", 64, 256000, True)),
    "ViT-SO400M-14-SigLIP2-378": (("erf", 1152, 27, 4304, 14, 378), ("tanh", 64, 256000, True)),
    "ViT-SO400M-16-SigLIP2-512": (("tanh", 1152, 27, 4304, 16, 512), ("tanh", 64, 256000, True)),
    "ViT-gopt-16-SigLIP2-384": (("tanh", 1536, 40, 6144, 16, 384), ("tanh", 64, 256000, True)),
}


@pytest.fixture(scope="module")
def their_configs() -> Path:
    open_clip = pytest.importorskip("open_clip")
    return Path(open_clip.__file__).parent / "model_configs"


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_understood(their_configs: Path, name: str) -> None:
    path = their_configs / f"{name}.json"
    content = json.loads(path.read_text())
    vision = _vision_config(section(Vision, content["vision_cfg"], path), path)
    text = _text_config(section(Text, content["text_cfg"], path), path)
    expected_vision, expected_text = RELEASED[name]
    sizes = (vision.gelu, vision.width, vision.depth, vision.mlp_dim, vision.patch_size, vision.image_size)
    assert sizes == expected_vision
    assert (text.gelu, text.context_length, text.vocab_size, text.projection) == expected_text
    with torch.device("meta"):
        Siglip(SiglipConfig(vision, text))


def test_every_released_config_has_the_gelu_of_its_timm_model(their_configs: Path) -> None:
    """The rule for timm's names, against timm itself, for the vision towers of all SigLIP configs."""
    timm = pytest.importorskip("timm")
    seen = {}
    for path in sorted(their_configs.glob("ViT-*SigLIP*.json")):
        values = json.loads(path.read_text())["vision_cfg"]
        seen[values["timm_model_name"]] = _vision_config(section(Vision, values, path), path)
    assert len(seen) >= 14
    for name, config in seen.items():
        with torch.device("meta"):
            block = timm.create_model(name).blocks[0]
        # timm wraps the tanh form in a class of its own
        is_tanh = (
            getattr(block.mlp.act, "approximate", "tanh") == "tanh" or "Tanh" in type(block.mlp.act).__name__
        )
        assert (config.gelu == "tanh") == is_tanh, name
        assert block.mlp.fc1.weight.shape == (config.mlp_dim, config.width), name
        assert block.attn.num_heads == config.heads, name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as open_clip pushes it to a hub, with the weights of the tiny model."""
    source = golden_folder(NAME)
    shutil.copy(source / WEIGHTS_FILE, tmp_path)
    model = json.loads((source / "tiny-SigLIP2.json").read_text())
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    write(tmp_path, {"model_cfg": model, "preprocess_cfg": preprocess})
    return tmp_path


def write(folder: Path, content: dict) -> None:
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "open_clip_config.json").read_text())
    change(content)
    write(folder, content)


def test_a_folder_brings_filter_and_text_rules(folder: Path) -> None:
    description = read_open_clip(folder, vision=vision_of("erf")).description
    assert description.resize == "bicubic"
    assert description.rules.strip_punctuation
    assert description.rules.pad == "eos"
    clean = {"tokenizer_kwargs": {"clean": "lower"}}
    change_config(folder, lambda c: c["model_cfg"]["text_cfg"].update(clean))
    rules = read_open_clip(folder, vision=vision_of("erf")).description.rules
    assert rules.lowercase
    assert not rules.strip_punctuation


REFUSED = [
    (lambda c: c["model_cfg"]["text_cfg"].update(no_causal_mask=False), "no_causal_mask"),
    (lambda c: c["model_cfg"]["text_cfg"].update(pool_type="argmax"), "pool_type last"),
    (lambda c: c["model_cfg"]["text_cfg"].pop("norm_kwargs"), "norm_kwargs.eps"),
    (lambda c: c["model_cfg"]["text_cfg"].pop("proj_bias"), "proj_bias"),
    (lambda c: c["model_cfg"].update(embed_dim=32), "embed_dim"),
    (lambda c: c["preprocess_cfg"].update(mean=[0.48, 0.46, 0.41]), "mean"),
    (lambda c: c["preprocess_cfg"].update(interpolation="random"), r"interpolation: 'random' is not one of"),
    (lambda c: c.update(model_cfg={}), "no model config of open_clip"),
    (lambda c: c.update(model_cfg="x"), "no model config of open_clip"),
    (lambda c: c.update(preprocess_cfg=[]), "preprocess_cfg: expected a group of keys, got"),
    (lambda c: c["model_cfg"]["text_cfg"].pop("width"), r"json lacks text_cfg\.width"),
    (lambda c: c["model_cfg"]["text_cfg"].pop("context_length"), r"json lacks text_cfg\.context_length"),
    (lambda c: c["model_cfg"]["text_cfg"].update(layers="2"), "text_cfg.layers: expected int, got '2'"),
    (lambda c: c["model_cfg"]["text_cfg"].update(norm_kwargs=1e-6), "norm_kwargs: expected a mapping"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_models_that_are_no_siglip_are_refused(folder: Path, change: Callable, message: str) -> None:
    change_config(folder, change)
    with pytest.raises(UserError, match=message):
        read_open_clip(folder, vision=vision_of("erf"))


def test_a_vision_tower_of_another_kind_is_told(folder: Path) -> None:
    change_config(folder, lambda c: c["model_cfg"].update(vision_cfg=None))
    with pytest.raises(UserError, match="vision_cfg: expected a group of keys, got None"):
        read_open_clip(folder)


def test_an_unknown_timm_name_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="vit_tiny64_patch8_siglip_32"):
        read_open_clip(folder)


def test_sizes_that_do_not_fit_the_weights_are_told(folder: Path) -> None:
    wrong = vision_of("erf")
    wrong.depth = 2
    with pytest.raises(UserError, match=r"unexpected: visual\.trunk\.blocks\.2"):
        read_open_clip(folder, vision=wrong)
