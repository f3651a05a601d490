"""Every published size goes through every format on the meta device: no tensor missing, left over or misshapen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_train.interop import big_vision, to_huggingface, to_open_clip
from siglip_train.interop.names import translate, translate_back
from siglip_train.interop.native import parameter_shapes
from siglip_train.interop.open_clip import timm_name
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from tests.interop.flax_layout import flax_tensors
from tests.tiers import one_in

B, L, SO400M, G = (768, 12, 3072, 12), (1024, 24, 4096, 16), (1152, 27, 4304, 16), (1536, 40, 6144, 16)


def sizes(tower: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("width", "depth", "mlp_dim", "heads"), tower, strict=True))


def model(
    vision: tuple, text: tuple, patch: int, pixels: int, vocabulary: int, context: int = 64, **more: Any
) -> SiglipConfig:
    projection = more.pop("projection", True)
    return SiglipConfig(
        VisionConfig(image_size=pixels, patch_size=patch, **sizes(vision), **more),
        TextConfig(context_length=context, vocab_size=vocabulary, projection=projection, **sizes(text)),
    )


# with the parameters of the whole model in millions, as transformers' classes count them, where they are known
RELEASED = {
    "B/16@224, 32k": (model(B, B, 16, 224, 32000), 203.16),
    "B/16@256, 250k": (model(B, B, 16, 256, 250000), 370.63),
    "B/32@256, 256k": (model(B, B, 32, 256, 256000), 376.86),
    "B/16@256, 256k": (model(B, B, 16, 256, 256000), 375.23),
    "L/16@256, 32k": (model(L, L, 16, 256, 32000), 652.15),
    "L/16@256, 256k": (model(L, L, 16, 256, 256000), 881.53),
    "So400m/14@224, 32k": (model(SO400M, SO400M, 14, 224, 32000, 16), 877.36),
    "So400m/14@384, 32k": (model(SO400M, SO400M, 14, 384, 32000), None),
    "So400m/16@256, 256k": (model(SO400M, SO400M, 16, 256, 256000), 1135.67),
    "So400m/16@256, i18n": (model(SO400M, SO400M, 16, 256, 250000, projection=False), None),
    "g-opt/16@256, 256k": (model(G, SO400M, 16, 256, 256000), 1871.39),
    "B/16 NaFlex": (model(B, B, 16, 256, 256000, position_grid=16), 375.23),
}
# built anew for each size, transformers' and open_clip's classes would take a minute; these have every form of tensor
BUILT = ("B/16@224, 32k", "B/16 NaFlex")


def meta_state(config: SiglipConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(Siglip(config).state_dict())


@pytest.mark.parametrize("name", one_in(3, RELEASED))
def test_no_tensor_is_left_over(name: str) -> None:
    config, millions = RELEASED[name]
    shapes = parameter_shapes(config)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if millions:
        assert sum(shape.numel() for shape in shapes.values()) / 1e6 == pytest.approx(millions, abs=0.006)
    conventions = ["huggingface"] if config.vision.position_grid else ["huggingface", "open_clip"]
    for convention in conventions:
        there = translate_back(state, config, convention)  # type: ignore[arg-type]
        back = translate(there, config, convention, where=Path(name))  # type: ignore[arg-type]
        assert {key: tensor.shape for key, tensor in back.items()} == shapes
    with torch.device("meta"):
        arrays = flax_tensors(Siglip(config), stacked=True)
    apart = big_vision._unstacked(arrays, Path(name))
    assert big_vision._config(apart, Path(name)) == config
    ours = {key: big_vision._as_ours(key, tensor) for key, tensor in apart.items()}
    back = translate(ours, config, "big_vision", where=Path(name))
    assert {key: tensor.shape for key, tensor in back.items()} == shapes


@pytest.mark.parametrize("name", BUILT)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = RELEASED[name][0]
    content = {
        "vision_config": to_huggingface._vision(config.vision),
        "text_config": to_huggingface._text(config),
    }
    family = to_huggingface.family(config)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**content))
    ours = translate_back(meta_state(config), config, "huggingface")
    assert {key: t.shape for key, t in ours.items()} == {
        key: t.shape for key, t in theirs.state_dict().items()
    }


def test_names_and_shapes_are_those_of_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    config = RELEASED["B/16@224, 32k"][0]
    # the released towers of these names have the exact GELU there; theirs is the name, which is what is asked here
    config.vision.gelu = "erf"
    vision = {
        "image_size": config.vision.image_size,
        "timm_model_name": timm_name(config.vision),
        "timm_pool": "map",
        "timm_proj": "none",
    }
    text = to_open_clip._text(config, has_tokenizer=False)
    with torch.device("meta"):
        theirs = open_clip.CustomTextCLIP(config.vision.width, vision, text, init_logit_bias=-10)
    config.vision.gelu = "tanh"
    ours = translate_back(meta_state(config), config, "open_clip")
    expected = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.items()} == expected
