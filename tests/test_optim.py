"""Parameter rules, the schedule, and what is decayed."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from siglip_train.errors import UserError
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig, patchify
from siglip_train.optim import OptimConfig, ParameterRule, schedule
from siglip_train.parameter_groups import UnusedParameters, build_optimizer, parameter_groups


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


def multipliers(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    groups = parameter_groups(model, config)
    return {name: group["lr_multiplier"] for group in groups for name in group["names"]}


def test_layer_decay_counts_from_the_top_of_each_tower() -> None:
    tower = {"width": 16, "mlp_dim": 32, "heads": 2}
    vision = VisionConfig(image_size=16, patch_size=8, depth=3, pool="cls", **tower)
    model = nn.ModuleDict(
        {
            "model": Siglip(
                SiglipConfig(vision, TextConfig(context_length=4, vocab_size=11, depth=1, **tower))
            ),
            "head": nn.Linear(16, 2),
        }
    )
    rule = ParameterRule(r"^model\.text\.", lr_multiplier=0.1)
    found = multipliers(model, OptimConfig(layer_decay=0.5, rules=[rule]))
    expected = {
        "head.weight": 1,
        "model.logit_scale": 1,
        "model.vision.encoder.norm.weight": 1,
        "model.vision.encoder.blocks.2.mlp.fc1.weight": 1 / 2,
        "model.vision.encoder.blocks.0.norm1.bias": 1 / 8,
        "model.vision.patch_embedding.bias": 1 / 16,
        "model.vision.position_table": 1 / 16,
        "model.vision.cls_token": 1 / 16,
        "model.text.head.weight": 0.1,
        "model.text.encoder.blocks.0.attention.query.weight": 0.1 / 2,
        "model.text.token_embedding.weight": 0.1 / 4,
        "model.text.position_table": 0.1 / 4,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert set(multipliers(model, OptimConfig()).values()) == {1.0}


def test_pretrained_weights_are_not_decayed_where_that_is_wanted(model: Siglip) -> None:
    pretrained = {name for name, _ in model.named_parameters() if name.startswith("vision.")}
    config = OptimConfig(decay_pretrained=False)
    names = {
        name
        for group in parameter_groups(model, config, pretrained)
        if group["weight_decay"] > 0
        for name in group["names"]
    }
    assert names == decayed(model, OptimConfig()) - pretrained
    assert decayed(model, config) == decayed(model, OptimConfig()), "nothing was loaded"


def test_what_is_frozen_already_stays_so() -> None:
    layers = nn.ModuleDict({"a": nn.Linear(2, 2).requires_grad_(requires_grad=False), "b": nn.Linear(2, 2)})
    assert sorted(multipliers(layers, OptimConfig())) == ["b.bias", "b.weight"]


def test_parameters_without_a_gradient_are_found() -> None:
    layers = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"})
    layers["c"].requires_grad_(requires_grad=False)
    watch = UnusedParameters(layers)
    layers["c"](layers["a"](torch.ones(1, 2))).sum().backward()
    assert watch.stop() == ["b.bias", "b.weight"]


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=result) if count else 0
        return result


def test_nothing_is_computed_backward_below_the_lowest_parameter_that_trains() -> None:
    sizes = {"width": 16, "mlp_dim": 32, "heads": 2}
    vision = VisionConfig(image_size=16, patch_size=8, depth=4, **sizes)
    model = Siglip(SiglipConfig(vision, TextConfig(context_length=4, vocab_size=11, depth=1, **sizes)))
    images = patchify(torch.rand(2, 3, 16, 16), 8)
    with torch.no_grad(), Products() as forward:
        tokens = model.vision(*images).tokens
    with torch.no_grad(), Products() as head:
        model.vision.pool(tokens)
    with Products() as whole:
        model.vision(*images).pooled.sum().backward()
    parameter_groups(model, OptimConfig(rules=[ParameterRule(r"^vision\.(?!pool)", frozen=True)]))
    with Products() as head_only:
        model.vision(*images).pooled.sum().backward()
    assert whole.total > 2.5 * forward.total
    # twice the forward of what trains, less the gradient of the tokens, which nothing asks for
    assert forward.total + head.total < head_only.total < forward.total + 2 * head.total
