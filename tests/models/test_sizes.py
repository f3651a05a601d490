"""Every size of conf/model has the parameters of the published model of that name."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"

# millions, from the HuggingFace modules of the same sizes: vision, MAP head, text, token embedding, full
PUBLISHED = [
    ("b16", {"image_size": 224}, {"vocab_size": 32000}, (92.88, 7.09, 110.27, 24.58, 203.16)),
    ("b16", {}, {"vocab_size": 250000}, (92.93, 7.09, 277.70, 192.00, 370.63)),
    ("b32", {}, {}, (94.55, 7.09, 282.30, 196.61, 376.86)),
    ("b16", {}, {}, (92.93, 7.09, 282.30, 196.61, 375.23)),
    ("l16", {}, {"vocab_size": 32000}, (315.96, 12.60, 336.19, 32.77, 652.15)),
    ("l16", {}, {}, (315.96, 12.60, 565.57, 262.14, 881.53)),
    ("so400m14", {}, {}, (427.68, 15.24, 449.68, 36.86, 877.36)),
    ("so400m16", {}, {}, (427.89, 15.24, 707.78, 294.91, 1135.67)),
    ("g16", {}, {}, (1163.17, 28.33, 708.23, 294.91, 1871.39)),
]

# no SigLIP of these sizes was published
OWN = ["tiny", "ti16", "s16"]


def build(name: str, vision: dict | None = None, text: dict | None = None) -> Siglip:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    config = SiglipConfig(
        VisionConfig(**values["vision"] | (vision or {})), TextConfig(**values["text"] | (text or {}))
    )
    with torch.device("meta"):
        return Siglip(config)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def millions(module: nn.Module) -> float:
    return round(size(module) / 1e6, 2)


@pytest.mark.parametrize(("name", "vision", "text", "expected"), PUBLISHED)
def test_published_sizes(name: str, vision: dict, text: dict, expected: tuple) -> None:
    model = build(name, vision, text)
    parts = (model.vision, model.vision.pool, model.text, model.text.token_embedding, model)
    assert tuple(millions(part) for part in parts) == expected


def block_size(width: int, hidden: int) -> int:
    return 4 * (width**2 + width) + 2 * width * hidden + hidden + width + 4 * width


@pytest.mark.parametrize("name", OWN)
def test_own_sizes_follow_from_their_config(name: str) -> None:
    model = build(name)
    vision, text = model.config.vision, model.config.text
    tokens = (vision.image_size // vision.patch_size) ** 2
    d, m = vision.width, vision.mlp_dim
    # a block, less the LayerNorm before its attention, plus the probe
    head = block_size(d, m) - 2 * d + d
    stem = 3 * vision.patch_size**2 * d + d + tokens * d
    assert size(model.vision) == stem + vision.depth * block_size(d, m) + 2 * d + head
    t = text.width
    tables = (text.vocab_size + text.context_length) * t
    blocks = text.depth * block_size(t, text.mlp_dim)
    assert size(model.text) == tables + blocks + 2 * t + t * d + d
    assert size(model) == size(model.vision) + size(model.text) + 2


def test_every_size_is_covered() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == {row[0] for row in PUBLISHED} | set(OWN)
