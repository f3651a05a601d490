"""Read a SigLIP or SigLIP 2 model, or a ViT alone, as big_vision wrote it: one `.npz`, blocks apart or stacked.

Such a file holds arrays alone, so the sizes are read off their shapes. It says neither how images are resized
nor which tokenizer belongs to it: those are what big_vision's own configurations for these models say.
"""

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.interop.augreg import as_big_vision, is_augreg
from siglip_train.interop.names import translate
from siglip_train.interop.native import Description, ModelFiles, check_absent, complain
from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig

_PARAMETERS = "params/"
_STACKED = "/encoderblock/"
_ATTENTION = "MultiHeadDotProductAttention_0"
# some older text towers add a second table inside the encoder
_INNER_POSITIONS = "txt/Encoder_0/pos_embedding"
_SIGLIP_2_VOCABULARY = 256000


def is_big_vision(path: Path) -> bool:
    """Whether `path` is an archive of numpy arrays, whatever its name. Raises `UserError` for one without its end."""
    if not path.is_file():
        return False
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise UserError(f"{path} is a damaged archive, its end is missing; copy the file again")
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_big_vision(path: Path, skip: Sequence[str] = ()) -> ModelFiles:
    """Read an `.npz`. The optimizer's state in a training checkpoint of big_vision is passed over.

    skip: as `translate` takes it. Raises `UserError` for damaged files and arrays, and for tensors that are missing or
    left over.
    """
    arrays = _unstacked(_read(path), path)
    description = _describe(arrays, path)
    check_absent(description, path, skip)
    tensors = {name: _as_ours(name, array) for name, array in arrays.items()}
    if _INNER_POSITIONS in tensors:
        tensors["txt/pos_embedding"] = tensors["txt/pos_embedding"] + tensors.pop(_INNER_POSITIONS)
    config = description.config
    return ModelFiles(description, translate(tensors, config, "big_vision", where=path, skip=skip))


def describe_big_vision(path: Path) -> Description:
    """Everything but the weights, from the heads of the arrays alone."""
    return _describe(_unstacked(_read_empty(path), path), path)


def _describe(arrays: Mapping[str, Tensor], path: Path) -> Description:
    if not any(name.startswith("txt/") for name in arrays) and "img/pos_embedding" in arrays:
        return Description(
            SiglipConfig(_vision(arrays, path)), origin="big_vision", absent=("text.", "logit_")
        )
    config = _config(arrays, path)
    is_siglip_2 = config.vision.position_grid is not None or config.text.vocab_size == _SIGLIP_2_VOCABULARY
    return Description(config, rules=TextRules(pad="pad" if is_siglip_2 else "eos"), origin="big_vision")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in archive.files if name.startswith(_PARAMETERS)] or archive.files
            return {name.removeprefix(_PARAMETERS): _tensor(archive[name]) for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}; copy the file again") from error


def _read_empty(path: Path) -> dict[str, Tensor]:
    """The arrays without their contents: tensors on the meta device."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            names = [name for name in names if name.startswith(_PARAMETERS)] or names
            return {name.removeprefix(_PARAMETERS): _empty(archive, name) for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the weights in {path}: {error}; copy the file again") from error


def _empty(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_head = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return torch.empty(read_head(file)[0], device="meta")


def _tensor(array: np.ndarray) -> Tensor:
    # numpy has no bfloat16 and gives back its bytes
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _unstacked(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Blocks of a scanned model apart: `encoderblock/x` of shape `[depth, ...]` becomes `encoderblock_i/x`."""
    if is_augreg(tensors):
        tensors = as_big_vision(tensors)
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _STACKED not in name:
            apart[name] = tensor
            continue
        if not tensor.ndim:
            raise UserError(f"{path}: {name} is a scalar, not a stack of blocks")
        for number, block in enumerate(tensor):
            apart[name.replace(_STACKED, f"/encoderblock_{number}/")] = block
    return apart


def _config(tensors: Mapping[str, Tensor], path: Path) -> SiglipConfig:
    needed = {"img/embedding/kernel", "img/pos_embedding", "txt/Embed_0/embedding", "txt/pos_embedding"}
    if not needed & tensors.keys():
        raise UserError(
            f"{path} is no SigLIP model of big_vision: it has none of {', '.join(sorted(needed))}"
        )
    complain(path, missing=needed - tensors.keys())
    return SiglipConfig(
        _vision(tensors, path),
        TextConfig(
            context_length=tensors["txt/pos_embedding"].shape[1],
            vocab_size=tensors["txt/Embed_0/embedding"].shape[0],
            projection="txt/head/kernel" in tensors,
            **_sizes(tensors, "txt/Encoder_0", path),
        ),
    )


def _vision(tensors: Mapping[str, Tensor], path: Path) -> VisionConfig:
    complain(path, missing={"img/embedding/kernel", "img/pos_embedding"} - tensors.keys())
    stem, positions = tensors["img/embedding/kernel"], tensors["img/pos_embedding"]
    # a NaFlex tower has a linear stem and keeps its table as an image
    naflex = stem.ndim == 2
    if positions.ndim != 3 or stem.ndim not in (2, 4):
        raise UserError(f"{path}: img/embedding/kernel {list(stem.shape)} is no stem of patches")
    patch_size = math.isqrt(stem.shape[0] // 3) if naflex else stem.shape[0]
    grid = math.isqrt(positions.shape[0] * positions.shape[1])
    return VisionConfig(
        image_size=_image_size(grid, patch_size),
        patch_size=patch_size,
        position_grid=grid if naflex else None,
        pool="cls" if "img/cls" in tensors else "map",
        **_sizes(tensors, "img/Transformer", path),
    )


def _image_size(grid: int, patch_size: int) -> int:
    # the one released model whose patches do not cover the image: 384 / 14
    return 384 if (grid, patch_size) == (27, 14) else grid * patch_size


def _sizes(tensors: Mapping[str, Tensor], encoder: str, path: Path) -> dict[str, Any]:
    """Width, depth, MLP width and heads of a tower, from its first block."""
    numbers = [int(m[1]) for name in tensors if (m := re.match(rf"{encoder}/encoderblock_(\d+)/", name))]
    query, hidden = (
        f"{encoder}/encoderblock_0/{leaf}/kernel" for leaf in (f"{_ATTENTION}/query", "MlpBlock_0/Dense_0")
    )
    complain(path, missing={query, hidden} - tensors.keys())
    shape = tensors[query].shape
    if len(shape) != 3 or tensors[hidden].ndim != 2:
        raise UserError(f"{path}: {query} is {list(shape)}, not [width, heads, width / heads]")
    return {
        "width": shape[0],
        "depth": max(numbers) + 1,
        "mlp_dim": tensors[hidden].shape[1],
        "heads": shape[1],
    }


def _as_ours(name: str, tensor: Tensor) -> Tensor:
    """flax's `[inputs..., outputs...]` as torch's `[outputs, inputs]`; a bias, a table flat."""
    if name.endswith(f"{_ATTENTION}/out/kernel"):
        return tensor.flatten(0, -2).T  # [H, D / H, D]
    if _ATTENTION in name and name.endswith("/kernel"):
        return tensor.flatten(1).T  # [D, H, D / H]
    if name.endswith("/kernel"):
        return tensor.flatten(0, -2).T  # [D, M]; the stem [p, p, 3, D] in (row, column, channel) order
    if name.endswith("pos_embedding"):
        return tensor.flatten(0, 1)  # [1, N, D] or [n, n, D]
    return tensor.flatten() if name.endswith("/bias") else tensor
