"""The table of names covers every parameter, once, in all conventions."""

from pathlib import Path

import pytest
import torch

from siglip_train.errors import UserError
from siglip_train.interop.names import Place, places, translate
from siglip_train.interop.native import parameter_shapes
from tests.models.small import small_config

CONVENTIONS = ["huggingface", "open_clip", "big_vision"]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_parameter_has_a_place_of_its_own(convention: str) -> None:
    config = small_config()
    found = places(config, convention)
    assert found.keys() == parameter_shapes(config).keys()
    assert len(set(found.values())) == len(found)
    fused: dict[str, list[int]] = {}
    for place in found.values():
        fused.setdefault(place.name, []).append(place.part)
        assert place.parts == 1 or "qkv" in place.name or "kv" in place.name or "in_proj" in place.name
    for name, parts in fused.items():
        counts = {place.parts for place in found.values() if place.name == name}
        assert counts == {len(parts)}, name
        assert sorted(parts) == list(range(len(parts))), name


def test_some_places_by_hand() -> None:
    hf, open_clip, big_vision = (places(small_config(), convention) for convention in CONVENTIONS)
    key = "vision.encoder.blocks.1.attention.key.bias"
    assert hf[key] == Place("vision_model.encoder.layers.1.self_attn.k_proj.bias")
    assert open_clip[key] == Place("visual.trunk.blocks.1.attn.qkv.bias", 1, 3)
    assert big_vision[key].name == ("img/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/bias")
    assert big_vision["text.encoder.norm.weight"] == Place("txt/Encoder_0/encoder_norm/scale")
    value = "vision.pool.attention.value.weight"
    assert hf[value] == Place("vision_model.head.attention.in_proj_weight", 2, 3)
    assert open_clip[value] == Place("visual.trunk.attn_pool.kv.weight", 1, 2)


def test_a_conv_stem_becomes_linear_and_scalars_vectors() -> None:
    config = small_config()
    shapes = parameter_shapes(config)
    tensors = {}
    for ours, place in places(config, "open_clip").items():
        piece = torch.randn(shapes[ours], dtype=torch.float16)
        tensors[place.name] = torch.cat([tensors[place.name], piece]) if place.name in tensors else piece
    kernel = torch.randn(24, 3, 4, 4)
    tensors["visual.trunk.patch_embed.proj.weight"] = kernel
    tensors["visual.trunk.pos_embed"] = tensors["visual.trunk.pos_embed"][None]
    tensors["logit_scale"] = torch.tensor(2.5)
    state = translate(tensors, config, "open_clip", where=Path("there"))
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    row, column, channel = 2, 1, 2
    flat = (row * 4 + column) * 3 + channel
    assert torch.equal(state["vision.patch_embedding.weight"][:, flat], kernel[:, channel, row, column])
    assert state["logit_scale"].tolist() == [2.5]


def test_transposed_tensors_are_not_reshaped_into_place() -> None:
    config = small_config()
    shapes = parameter_shapes(config)
    tensors: dict[str, torch.Tensor] = {}
    for ours, place in places(config, "huggingface").items():
        piece = torch.zeros(shapes[ours])
        tensors[place.name] = torch.cat([tensors[place.name], piece]) if place.name in tensors else piece
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    tensors[name] = tensors[name].T
    with pytest.raises(UserError, match=rf"{name} \[16, 20\]"):
        translate(tensors, config, "huggingface", where=Path("there"))
