"""Which model of conf/model a run trains, and in what it differs from the nearest; those files alone hold sizes."""

import dataclasses
import importlib.resources
from typing import Any, NamedTuple

import yaml

from siglip_train.models.siglip import SiglipConfig
from siglip_train.typed import build

# what the files of conf/model are called in the papers
_PUBLISHED = {
    "b16": "SigLIP 2 B/16",
    "b32": "SigLIP 2 B/32",
    "l16": "SigLIP 2 L/16",
    "so400m16": "SigLIP 2 So400m/16",
    "g16": "SigLIP 2 g-opt/16",
    "b16_224": "SigLIP 2 B/16",
    "b16_384": "SigLIP 2 B/16",
    "b16_512": "SigLIP 2 B/16",
    "l16_384": "SigLIP 2 L/16",
    "l16_512": "SigLIP 2 L/16",
    "so400m16_384": "SigLIP 2 So400m/16",
    "so400m16_512": "SigLIP 2 So400m/16",
    "siglip2_so400m14_224": "SigLIP 2 So400m/14",
    "siglip2_so400m14_384": "SigLIP 2 So400m/14",
    "g16_384": "SigLIP 2 g-opt/16",
    "siglip_b16_224": "SigLIP B/16",
    "siglip_b16_256": "SigLIP B/16",
    "siglip_b16_384": "SigLIP B/16",
    "siglip_b16_512": "SigLIP B/16",
    "siglip_l16_256": "SigLIP L/16",
    "siglip_l16_384": "SigLIP L/16",
    "so400m14": "SigLIP So400m/14",
    "so400m14_384": "SigLIP So400m/14",
    "msiglip_b16": "mSigLIP B/16",
    "siglit_b8": "SigLiT B/8",
    "siglit_g14": "SigLiT g/14",
}
_OWN = {
    "s16": "S/16",
    "ti16": "Ti/16",
    "tiny": "tiny",
    "tiny_cifar": "tiny_cifar",
    "tiny_clothing": "tiny_clothing",
    "tiny_emoji": "tiny_emoji",
    "tiny_p8": "tiny_p8",
    "tiny_p8_96": "tiny_p8_96",
}
# one with more other sizes than this is no variant of any of them
_MOST_DIFFERENCES = 4


class Likeness(NamedTuple):
    """title: with the side of its images, `SigLIP 2 B/16, 256 px`. note: how near it is to what the title says."""

    title: str
    note: str


def likeness(config: SiglipConfig) -> Likeness:
    """The model of conf/model that `config` is, or the one that it differs from in the fewest sizes."""
    found = {name: differences(config, of_file(name)) for name in (*_PUBLISHED, *_OWN)}
    nearest = min(found, key=lambda name: len(found[name]))
    pixels = f"{config.vision.image_size} px"
    if len(found[nearest]) > _MOST_DIFFERENCES:
        return Likeness(f"model of its own sizes, {pixels}", "unlike any in conf/model")
    title = f"{_PUBLISHED.get(nearest) or _OWN[nearest]}, {pixels}"
    if found[nearest]:
        return Likeness(title, f"differs from {nearest} in {', '.join(found[nearest])}")
    return Likeness(title, "as published" if nearest in _PUBLISHED else f"as in conf/model/{nearest}.yaml")


def of_file(name: str) -> SiglipConfig:
    """The sizes in conf/model/NAME.yaml; what it leaves out has the dataclasses' defaults."""
    return build(SiglipConfig, _values_of(name), "model")


def _values_of(name: str) -> dict[str, Any]:
    """With those of the files that it names among its `defaults` below them, as Hydra composes it."""
    text = (importlib.resources.files("conf") / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    for base in reversed(values.pop("defaults", [])):
        if base != "_self_":
            below = _values_of(base)
            values = {key: {**below.get(key, {}), **values.get(key, {})} for key in (*below, *values)}
    return values


def differences(config: SiglipConfig, other: SiglipConfig) -> list[str]:
    """What `config` has otherwise than `other`, as `text.depth (1 instead of 12)`."""
    ours, theirs = _flat(config), _flat(other)
    return [f"{key} ({ours[key]} instead of {theirs[key]})" for key in ours if ours[key] != theirs[key]]


def _flat(config: SiglipConfig) -> dict[str, object]:
    vision, text = dataclasses.asdict(config.vision), dataclasses.asdict(config.text)
    # written out or left out, the grid of the images is the usual one
    vision["position_grid"] = (
        None if config.vision.table_side == config.vision.grid else config.vision.table_side
    )
    towers = {"vision": vision, "text": text}
    return {f"{tower}.{key}": value for tower, values in towers.items() for key, value in values.items()}
