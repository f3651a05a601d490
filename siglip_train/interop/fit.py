"""Weights of one model as a start for another: what fits is taken, position table and stem are resampled on request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from siglip_train.errors import UserError
from siglip_train.interop.files import shortened
from siglip_train.interop.native import Description, ModelFiles, Origin, parameter_shapes
from siglip_train.models.patches import resize_patch_kernel
from siglip_train.models.positions import Resampling, resize_position_table
from siglip_train.models.siglip import SiglipConfig

_POSITIONS = "vision.position_table"
_STEM = "vision.patch_embedding.weight"
_RESAMPLINGS: dict[Origin, Resampling] = {
    "native": "corner_aligned",
    "big_vision": "corner_aligned",
    "huggingface": "bicubic",
    "open_clip": "bicubic_antialiased",
}


@dataclass
class LoadReport:
    """What became of each tensor.

    fresh: in the model only, left at its initial value. unused: in the file only.
    """

    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for name in ("resampled", "fresh", "unused"):
            tensors = getattr(self, name)
            if tensors:
                parts.append(f"{len(tensors)} {name} ({shortened(tensors)})")
        return ", ".join(parts)


def fit_weights(
    files: ModelFiles,
    config: SiglipConfig,
    *,
    where: Path,
    resample: bool = True,
    fresh: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of `files` that a model of `config` takes, and what became of each.

    A position table of another size is resized as the origin of the weights does it, that of a NaFlex model always
    with half-pixel centres; a stem of another patch size by FlexiViT's pseudo-inverse. skip: beginnings of names that
    are left out whatever fits; a whole tower (`text.`) need not have our heads then.
    Raises `UserError` with the names of all tensors that are missing or of another shape and not `fresh`, and where
    heads or activation differ, as such weights would load and mean something else.
    """
    _check_same_meaning(files.description.config, config, where, skip)
    shapes = parameter_shapes(config)
    state: dict[str, Tensor] = {}
    report = LoadReport(unused=sorted(files.state.keys() - shapes.keys()))
    problems = []
    for name, shape in shapes.items():
        tensor = files.state.get(name)
        resampled = _resampled(name, tensor, files.description, config) if resample else None
        if name.startswith(tuple(skip)):
            report.fresh.append(name)
        elif tensor is not None and tensor.shape == shape:
            state[name] = tensor
            report.loaded.append(name)
        elif resampled is not None and resampled.shape == shape:
            state[name] = resampled
            report.resampled.append(name)
        elif name.startswith(tuple(fresh)):
            report.fresh.append(name)
        else:
            found = "missing" if tensor is None else f"{list(tensor.shape)} instead of {list(shape)}"
            problems.append(f"{name} ({found})")
    if problems:
        raise UserError(f"the weights in {where} do not fit the model: {shortened(problems)}")
    return state, report


def is_left_out(tower: str, skip: Sequence[str]) -> bool:
    """Whether all names of the tower, `vision` or `text`, begin as one of `skip` does."""
    return f"{tower}.".startswith(tuple(skip))


def _resampled(name: str, tensor: Tensor | None, source: Description, target: SiglipConfig) -> Tensor | None:
    theirs, ours = source.config.vision, target.vision
    if tensor is None:
        return None
    if name == _POSITIONS and theirs.table_side != ours.table_side:
        is_naflex = theirs.position_grid is not None
        convention = "half_pixel" if is_naflex else _RESAMPLINGS[source.origin]
        return resize_position_table(tensor, ours.table_side, convention)
    if name == _STEM and theirs.patch_size != ours.patch_size:
        return resize_patch_kernel(tensor, ours.patch_size).to(torch.float32)
    return None


def _check_same_meaning(theirs: SiglipConfig, ours: SiglipConfig, path: Path, skip: Sequence[str]) -> None:
    for tower in ("vision", "text"):
        if is_left_out(tower, skip):
            continue
        for key in ("heads", "gelu"):
            there, here = getattr(getattr(theirs, tower), key), getattr(getattr(ours, tower), key)
            if there != here:
                raise UserError(
                    f"the model in {path} has {tower}.{key} {there}, this one {here}: "
                    f"set model.{tower}.{key}={there}"
                )
