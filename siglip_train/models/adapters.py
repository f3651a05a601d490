"""LoRA: low-rank adapters beside linear layers (`peft`), and the plain weights that both together amount to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from siglip_train.errors import UserError

# peft's names: a layer `query` becomes query.base_layer, query.lora_A.default and query.lora_B.default
_BASE, _ADAPTER = ".base_layer.", ".lora_"


@dataclass
class AdapterConfig:
    """Train a low-rank update of some linear layers in place of their weights; all else in the model is frozen.

    rank: of the update. alpha: the update is scaled by alpha / rank. dropout: of what the adapter reads. pattern: the
    layers whose name it finds (re.search): of `vision` and `text`, blocks `encoder.blocks.N` with `attention.query`,
    `.key`, `.value`, `.out`, `mlp.fc1` and `mlp.fc2`.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    pattern: str = r"encoder\..*\.(query|key|value|out)$"

    def __post_init__(self) -> None:
        """Check ranges and the pattern."""
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError("rank must be at least 1, alpha above 0, and dropout in 0..1, below 1")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None


def add_adapters(model: nn.Module, config: AdapterConfig) -> None:
    """Put adapters beside the layers that `config` names, and freeze every other parameter of `model`.

    An adapter changes nothing until it is trained. Raises `UserError` where peft is missing or no layer is meant.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f'adapters need peft ({error}): pip install "siglip-train[lora]"') from None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = [name for name in linear if re.search(config.pattern, name)]
    if not layers:
        raise UserError(f"adapters.pattern: {config.pattern!r} finds no linear layer; there is {linear[-1]}")
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=layers
    )
    inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = _ADAPTER in name


def merged(state: Mapping[str, Tensor], config: AdapterConfig | None) -> dict[str, Tensor]:
    """Weights with each adapter added to its layer, under the names of a model that never had adapters."""
    plain = {}
    for name, tensor in state.items():
        layer, base, leaf = name.partition(_BASE)
        if base and leaf == "weight":
            assert config is not None, name
            down, up = (state[f"{layer}{_ADAPTER}{part}.default.weight"] for part in "AB")
            plain[f"{layer}.weight"] = tensor + (config.alpha / config.rank) * (up @ down)
        elif _ADAPTER not in name:
            plain[name.replace(_BASE, ".")] = tensor
    return plain


def is_unmerged(name: str) -> bool:
    """Whether a parameter is part of an adapted layer, and so not found among the merged weights."""
    return _BASE in name or _ADAPTER in name


def merged_name(name: str) -> str:
    """The name that the layer of an adapter has among the merged weights."""
    return name.replace(_BASE, ".")
