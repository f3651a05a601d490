"""What command lines of `siglip-train` and `siglip-eval` compose to, each composed once."""

import copy
import functools
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from siglip_train.composition import defaults_of, plain
from siglip_train.config import Config
from siglip_train.evaluate import EvaluateConfig
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.settings.starting_point import fill
from siglip_train.typed import build
from tests.conftest import ROOT

CONFIGS = {"train": Config, "evaluate": EvaluateConfig}


def names(group: str) -> list[str]:
    """The files of a group of conf/, without those that others build on."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def composed(*overrides: str, program: str = "train") -> dict[str, Any]:
    """The config that `siglip-train OVERRIDES` is given (program="evaluate": siglip-eval), as values of one's own."""
    return copy.deepcopy(_composed(program, overrides))


def filled(*overrides: str) -> dict[str, Any]:
    """The same of a run from scratch, with what it leaves open filled."""
    return fill({**composed(*overrides), "init_from": None, "resume": None}).values


@functools.cache
def _composed(program: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    ConfigStore.instance().store(name=f"{program}_defaults", node=defaults_of(CONFIGS[program]))
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        return plain(compose(program, overrides=list(overrides)))


def sizes(*overrides: str) -> SiglipConfig:
    """The sizes of the model that `siglip-train OVERRIDES` trains, from scratch."""
    return build(SiglipConfig, filled(*overrides)["model"], "model")


@functools.cache
def on_meta(model: str) -> Siglip:
    """The model of `model=NAME`, without memory for its weights."""
    with torch.device("meta"):
        return Siglip(sizes(f"model={model}"))
