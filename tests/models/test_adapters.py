"""LoRA: what trains, what merging gives (against peft's own), and mistakes."""

import sys

import pytest
import torch
from torch import nn

from siglip_train import engine as engines
from siglip_train.errors import UserError
from siglip_train.models.adapters import AdapterConfig, add_adapters, merged, merged_name
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.training_model import TrainingModel
from tests.objectives.tiny import tiny_batch, tiny_model

IMAGES = tiny_batch(3, torch.float32).part("images")


def adapted(config: AdapterConfig, seed: int = 1) -> Siglip:
    """A tiny model whose adapters are drawn, as if they had been trained."""
    pytest.importorskip("peft")
    model = tiny_model(torch.float32)
    add_adapters(model, config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_adapters_change_nothing_before_they_train_and_nothing_else_does():
    pytest.importorskip("peft")
    model, plain = tiny_model(torch.float32), tiny_model(torch.float32)
    add_adapters(model, AdapterConfig(rank=2))
    # equal in torch 2.15; 2.11 multiplies in another order
    torch.testing.assert_close(model.encode_image(IMAGES), plain.encode_image(IMAGES), rtol=0, atol=1e-6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {
        f"{tower}.encoder.blocks.0.attention.{part}"
        for tower in ("vision", "text")
        for part in ("query", "key", "value", "out")
    }
    assert trained == {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}


@pytest.mark.parametrize("pattern", [AdapterConfig.pattern, r"^vision\..*\.(query|fc2)$"])
def test_merged_weights_are_those_of_peft_and_of_the_model_with_adapters(pattern: str):
    config = AdapterConfig(rank=3, alpha=5.0, pattern=pattern)
    model = adapted(config)
    expected = model.encode_image(IMAGES)
    assert not torch.allclose(expected, tiny_model(torch.float32).encode_image(IMAGES), atol=1e-3)
    plain = tiny_model(torch.float32)
    plain.load_state_dict(merged(model.state_dict(), config))
    torch.testing.assert_close(plain.encode_image(IMAGES), expected, rtol=0, atol=1e-6)
    for module in model.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    layers = [(name, tensor) for name, tensor in model.state_dict().items() if ".lora_" not in name]
    assert len(layers) == len(plain.state_dict())
    for name, tensor in layers:
        torch.testing.assert_close(plain.state_dict()[merged_name(name)], tensor, rtol=0, atol=1e-6)


def test_a_model_without_adapters_is_merged_already():
    state = tiny_model(torch.float32).state_dict()
    assert merged(state, None).keys() == state.keys()


def test_dropout_of_adapters_is_drawn_alike_when_activations_are_recomputed():
    gradients = []
    for recompute in (False, True):
        model = adapted(AdapterConfig(rank=2, dropout=0.5)).train()
        speed = engines.EngineConfig(activation_checkpointing=recompute)
        engines.apply_speed_options(TrainingModel(model, {}), speed)
        torch.manual_seed(5)
        model.encode_image(IMAGES).square().sum(1).mul(torch.arange(3)).sum().backward()
        (model.vision(*IMAGES).pooled * torch.arange(16)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name


def test_mistakes_are_answered_in_one_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="rank must be at least 1"):
        AdapterConfig(rank=0)
    with pytest.raises(ValueError, match="not a regular expression"):
        AdapterConfig(pattern="(")
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"finds no linear layer; there is text\.head"):
        add_adapters(tiny_model(), AdapterConfig(pattern="query_proj"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"siglip-train\[lora\]"):
        add_adapters(tiny_model(), AdapterConfig())
