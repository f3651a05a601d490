"""Parameter rules, the schedule, and what is decayed."""

import math

import pytest
import torch
from torch import nn

from siglip_train.errors import UserError
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from siglip_train.optim import OptimConfig, ParameterRule, build_optimizer, parameter_groups, schedule


@pytest.fixture(scope="module")
def model() -> Siglip:
    return Siglip(
        SiglipConfig(
            VisionConfig(image_size=16, patch_size=8, width=16, depth=1, mlp_dim=32, heads=2),
            TextConfig(context_length=4, vocab_size=11, width=16, depth=1, mlp_dim=32, heads=2),
        )
    )


def decayed(model: nn.Module, config: OptimConfig) -> set[str]:
    return {
        name
        for group in parameter_groups(model, config)
        if group["weight_decay"] > 0
        for name in group["names"]
    }


def test_exactly_the_weights_of_linear_layers_are_decayed(model: Siglip) -> None:
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert decayed(model, OptimConfig()) == linear


def test_every_parameter_is_in_one_group(model: Siglip) -> None:
    names = [name for group in parameter_groups(model, OptimConfig()) for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_a_parameter_that_no_rule_covers_is_an_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strange = nn.Parameter(torch.zeros(3))

    with pytest.raises(UserError, match="no rule covers the parameter strange"):
        parameter_groups(Odd(), OptimConfig())


def test_rules_freeze_and_scale(model: Siglip) -> None:
    config = OptimConfig(
        rules=[ParameterRule(r"^vision\.", frozen=True), ParameterRule(r"^text\..*weight", lr_multiplier=0.1)]
    )
    groups = parameter_groups(model, config)
    names = {name for group in groups for name in group["names"]}
    assert not any(name.startswith("vision.") for name in names)
    assert not any(parameter.requires_grad for parameter in model.vision.parameters())
    assert {group["lr_multiplier"] for group in groups} == {0.1, 1.0}
    model.requires_grad_(requires_grad=True)


def test_a_rule_that_covers_nothing_is_an_error(model: Siglip) -> None:
    with pytest.raises(UserError, match="covers no parameter"):
        parameter_groups(model, OptimConfig(rules=[ParameterRule("visoin")]))


def test_decay_follows_the_schedule_as_in_big_vision() -> None:
    """One step on a zero gradient: weight * (1 - lr * decay), lr 1e-3 and decay 0.1 being the papers' 1e-4."""
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(nn.ModuleDict({"layer": layer}), OptimConfig(lr=1e-3, weight_decay=0.1))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before * (1 - 1e-4))


def test_schedule_warms_up_and_ends_at_zero() -> None:
    config = OptimConfig(warmup_samples=100)
    factors = [
        schedule(config, samples_seen=seen, batch=10, total_samples=1100) for seen in range(0, 1101, 10)
    ]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
    linear = OptimConfig(schedule="linear")
    assert schedule(linear, samples_seen=25, batch=5, total_samples=100) == pytest.approx(0.75)
    assert schedule(OptimConfig(schedule="constant"), samples_seen=99, batch=1, total_samples=100) == 1.0
