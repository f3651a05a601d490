"""Every size of conf/model has the parameters of the published model of that name."""

import pytest
from torch import nn

from siglip_train.models.siglip import Siglip
from tests.composing import names, on_meta, sizes

# millions: vision, MAP head, text, token embedding, full; of published sizes from the HuggingFace modules of the same
PARAMETERS = {
    "b32": (94.55, 7.09, 282.30, 196.61, 376.86),
    "b16": (92.93, 7.09, 282.30, 196.61, 375.23),
    "l16": (315.96, 12.60, 565.57, 262.14, 881.53),
    "so400m14": (427.68, 15.24, 449.68, 36.86, 877.36),
    "so400m16": (427.89, 15.24, 707.78, 294.91, 1135.67),
    "g16": (1163.17, 28.33, 708.23, 294.91, 1871.39),
    "siglip_b16_224": (92.88, 7.09, 110.27, 24.58, 203.16),
    "siglip_l16_256": (315.96, 12.6, 336.19, 32.77, 652.15),
    "msiglip_b16": (92.93, 7.09, 277.7, 192.0, 370.63),
    # of longer position tables alone, or of shapes that were never released with their text tower
    "siglip_b16_256": (92.93, 7.09, 110.27, 24.58, 203.2),
    "siglip_b16_384": (93.18, 7.09, 110.27, 24.58, 203.45),
    "siglip_b16_512": (93.52, 7.09, 110.27, 24.58, 203.79),
    "siglip_l16_384": (316.28, 12.6, 336.19, 32.77, 652.48),
    "so400m14_384": (428.23, 15.24, 449.73, 36.86, 877.96),
    "siglit_b8": (85.81, 0.0, 184.73, 32.77, 270.54),
    "siglit_g14": (1036.65, 25.25, 336.54, 32.77, 1373.19),
    "b16_224": (92.88, 7.09, 282.3, 196.61, 375.19),
    "b16_384": (93.18, 7.09, 282.3, 196.61, 375.48),
    "b16_512": (93.52, 7.09, 282.3, 196.61, 375.82),
    "l16_384": (316.28, 12.6, 565.57, 262.14, 881.85),
    "l16_512": (316.74, 12.6, 565.57, 262.14, 882.31),
    "siglip2_so400m14_224": (427.68, 15.24, 707.78, 294.91, 1135.46),
    "siglip2_so400m14_384": (428.23, 15.24, 707.78, 294.91, 1136.01),
    "so400m16_384": (428.26, 15.24, 707.78, 294.91, 1136.04),
    "so400m16_512": (428.77, 15.24, 707.78, 294.91, 1136.56),
    "g16_384": (1163.66, 28.33, 708.23, 294.91, 1871.89),
    # those of the checkpoint; without one B/16's
    "auto": (92.93, 7.09, 282.30, 196.61, 375.23),
    "auto_384": (93.18, 7.09, 282.30, 196.61, 375.48),
    # no SigLIP of these sizes was published; a test below derives them from their sizes
    "ti16": (5.97, 0.44, 11.53, 6.14, 17.5),
    "s16": (23.44, 1.77, 33.75, 12.29, 57.19),
    "tiny": (0.7, 0.2, 0.35, 0.13, 1.04),
    "tiny_p8": (0.63, 0.2, 0.35, 0.13, 0.98),
    "tiny_p8_96": (0.64, 0.2, 0.35, 0.13, 0.99),
    "tiny_cifar": (0.61, 0.2, 0.47, 0.05, 1.08),
    "tiny_clothing": (0.63, 0.2, 0.47, 0.05, 1.09),
    "tiny_emoji": (0.7, 0.2, 0.94, 0.52, 1.64),
}


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def millions(module: nn.Module) -> float:
    return round(size(module) / 1e6, 2)


def parts(model: Siglip) -> tuple:
    pool = getattr(model.vision, "pool", nn.Identity())
    return tuple(
        millions(module) for module in (model.vision, pool, model.text, model.text.token_embedding, model)
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes(name: str) -> None:
    assert parts(on_meta(name)) == PARAMETERS[name]


def block_size(width: int, hidden: int) -> int:
    return 4 * (width**2 + width) + 2 * width * hidden + hidden + width + 4 * width


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_follow_from_their_config(name: str) -> None:
    model = on_meta(name)
    vision, text = model.config.vision, model.config.text
    tokens = (vision.image_size // vision.patch_size) ** 2
    d, m = vision.width, vision.mlp_dim
    # a block, less the LayerNorm before its attention, plus the probe; or a token of the class
    head = block_size(d, m) - 2 * d + d if vision.pool == "map" else d
    stem = 3 * vision.patch_size**2 * d + d + tokens * d
    assert size(model.vision) == stem + vision.depth * block_size(d, m) + 2 * d + head
    t = text.width
    tables = (text.vocab_size + text.context_length) * t
    blocks = text.depth * block_size(t, text.mlp_dim)
    assert size(model.text) == tables + blocks + 2 * t + t * d + d
    assert size(model) == size(model.vision) + size(model.text) + 2


def test_every_size_is_covered() -> None:
    assert set(names("model")) == set(PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", names("experiment"))
def test_no_experiment_lies_over_a_model(experiment: str) -> None:
    for model, expected in PARAMETERS.items():
        assert sizes(f"experiment={experiment}", f"model={model}") == sizes(f"model={model}"), model
        assert millions(on_meta(model)) == expected[-1]
