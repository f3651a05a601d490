"""AugReg's ViT towers: the same numbers as timm's reader gives, and a locked tower that a text tower is trained to."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from siglip_train.errors import UserError
from siglip_train.interop.load import load_model, load_weights, read_description, read_model
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import patchify

WIDTH, HEADS, DEPTH, HIDDEN, PATCH, SIDE = 32, 4, 2, 48, 8, 3


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tower with the names and shapes of the released `.npz` files."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple] = {
        "embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        "cls": (1, 1, WIDTH),
        "Transformer/posembed_input/pos_embedding": (1, 1 + SIDE**2, WIDTH),
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
        "head/kernel": (WIDTH, 5),
        "head/bias": (5,),
    }
    for block in range(DEPTH):
        start = f"Transformer/encoderblock_{block}/"
        attention = f"{start}MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            shapes[f"{attention}{part}/kernel"] = (WIDTH, HEADS, WIDTH // HEADS)
            shapes[f"{attention}{part}/bias"] = (HEADS, WIDTH // HEADS)
        shapes |= {f"{attention}out/kernel": (HEADS, WIDTH // HEADS, WIDTH), f"{attention}out/bias": (WIDTH,)}
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{start}{norm}/scale": (WIDTH,), f"{start}{norm}/bias": (WIDTH,)}
        shapes |= {
            f"{start}MlpBlock_3/Dense_0/kernel": (WIDTH, HIDDEN),
            f"{start}MlpBlock_3/Dense_0/bias": (HIDDEN,),
        }
        shapes |= {
            f"{start}MlpBlock_3/Dense_1/kernel": (HIDDEN, WIDTH),
            f"{start}MlpBlock_3/Dense_1/bias": (WIDTH,),
        }
    path = tmp_path_factory.mktemp("augreg") / "B_8.npz"
    np.savez(
        path, **{name: generator.normal(size=shape).astype("f4") * 0.2 for name, shape in shapes.items()}
    )
    return path


def fitting(tower: Path) -> Siglip:
    sizes = read_description(tower).config.vision
    return Siglip(SiglipConfig(sizes, TextConfig(4, 11, width=16, depth=1, mlp_dim=16, heads=2)))


@torch.no_grad()
def test_pooled_and_tokens_equal_those_of_timms_reader(tower: Path) -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    theirs = timm.VisionTransformer(
        img_size=PATCH * SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH, num_classes=0, act_layer=partial(torch.nn.GELU, approximate="tanh"),
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    theirs.load_pretrained(str(tower))
    model = fitting(tower)
    report = load_weights(model, tower, skip=["text.", "logit_"])
    assert not report.resampled
    assert {name.split(".")[0] for name in report.fresh} == {"text", "logit_scale", "logit_bias"}
    pixels = torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE, generator=torch.Generator().manual_seed(0))
    found, expected = model.vision(*patchify(pixels, PATCH)), theirs.eval().forward_features(pixels)
    # measured 2e-6
    torch.testing.assert_close(found.pooled, expected[:, 0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found.tokens, expected[:, 1:], rtol=0, atol=2e-5)


def test_it_is_an_image_tower_alone_and_is_said_to_be(tower: Path) -> None:
    description = read_description(tower)
    vision = description.config.vision
    assert (vision.image_size, vision.patch_size, vision.pool, vision.gelu) == (24, 8, "cls", "tanh")
    assert description.absent == ("text.", "logit_")
    for reader in (load_model, read_model):
        with pytest.raises(UserError, match=r"no whole image-text model.*init_skip=\[text., logit_\]"):
            reader(tower)


def test_a_layer_before_the_labels_is_not_left_out_in_silence(tower: Path, tmp_path: Path) -> None:
    """The first ViT files have one, and its output is what their labels were trained on."""
    with np.load(tower) as file:
        np.savez(tmp_path / "old.npz", **file, **{"pre_logits/kernel": np.zeros((WIDTH, WIDTH), "f4")})
    with pytest.raises(UserError, match="pre_logits/kernel"):
        read_model(tmp_path / "old.npz", skip=["text.", "logit_"])
