"""Our own export folder: `model.safetensors`, `config.json` and the tokenizer; also what a checkpoint holds.

`Description` and `ModelFiles` are what every reader of this package gives back.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.files.atomic import put_folder
from siglip_train.interop.files import (
    check_file_name,
    read_json,
    read_tensors,
    section,
    shortened,
    write_tensors,
)
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from siglip_train.typed import build

FORMAT = "siglip_train"
VERSION = 1
# the key of tokenizer_config.json under which text rules travel through formats that know none
RULES_KEY = "text_rules"
# where a tokenizer stands in a folder whose config would change it
TOKENIZER_FOLDER = "tokenizer"

_TOKENIZERS = ("tokenizer.json", "*.model")
# they name the special tokens of a tokenizer.json
_TOKENIZER_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")

Origin = Literal["native", "huggingface", "open_clip", "big_vision"]
Resize = Literal["bilinear", "bicubic"]


@dataclass
class Description:
    """Everything but the weights that a model needs to be used.

    tokenizer: a tokenizer file or a folder with one, None = unknown. resize: the filter that squashes images.
    origin: the library whose files these are. absent: beginnings of the names of parameters that they lack, `text.` and
    `logit_` of an image tower alone; the sizes of what is absent mean nothing.
    """

    config: SiglipConfig
    tokenizer: Path | None = None
    rules: TextRules = field(default_factory=TextRules)
    resize: Resize = "bilinear"
    origin: Origin = "native"
    absent: tuple[str, ...] = ()


class ModelFiles(NamedTuple):
    """A model as read from disk: its description and its weights under our names, in fp32."""

    description: Description
    state: dict[str, Tensor]


@dataclass
class _Towers:
    """Unlike `SiglipConfig`, without defaults."""

    vision: VisionConfig
    text: TextConfig


@dataclass
class _Tokenizer:
    """The name of its file, beside which its rules stand."""

    file: str | None


@dataclass
class _Image:
    resize: Resize


@dataclass
class _Export:
    """config.json."""

    model: dict[str, Any]
    tokenizer: dict[str, Any]
    image: _Image


@dataclass
class _TokenizerConfig:
    """What a conversion of ours adds to tokenizer_config.json, under `RULES_KEY`."""

    text_rules: TextRules | None = None


def check_absent(description: Description, path: Path, skip: Sequence[str]) -> None:
    """Raise a `UserError` where the files at `path` lack parameters that `skip` does not leave out."""
    lacking = [name for name in description.absent if not name.startswith(tuple(skip))]
    if lacking:
        raise UserError(
            f"{path} is no whole image-text model: it has no parameters that begin with {', '.join(lacking)}; a "
            f"training can start from it (init_skip=[{', '.join(lacking)}]), else give the model it was made from"
        )


def parameter_shapes(config: SiglipConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of a model, without allocating it."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Siglip(config).state_dict().items()}


def is_native(folder: Path) -> bool:
    """Whether `folder` is an export folder of this format."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("format") == FORMAT


def write_export(folder: Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write an export folder aside, then put it in place; an earlier export there is replaced.

    Raises `UserError` if `folder` holds something else.
    """
    if folder.exists() and not is_native(folder):
        raise UserError(f"{folder} exists and is not an export; choose another folder or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(
        {name: tensor.contiguous() for name, tensor in state.items()}, partial / "model.safetensors"
    )
    tokenizer = None if description.tokenizer is None else copy_tokenizer(description.tokenizer, partial)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(description.config),
        "tokenizer": {"file": tokenizer, **asdict(description.rules)},
        "image": {"resize": description.resize},
    }
    (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    put_folder(partial, folder)


def read_export(folder: Path, skip: Sequence[str] = ()) -> ModelFiles:
    """Read an export folder.

    skip: beginnings of names that may be missing or left over. Raises `UserError` for another version, wrong keys or
    values, and unfitting tensors.
    """
    description = describe_export(folder)
    state = read_tensors(folder / "model.safetensors")
    check_fit(state, description.config, where=folder, skip=skip)
    return ModelFiles(description, state)


def describe_export(folder: Path) -> Description:
    """Everything but the weights of an export folder."""
    content = read_json(folder / "config.json")
    if content.get("version") != VERSION:
        raise UserError(
            f"{folder} is an export of version {content.get('version')}, this program reads {VERSION}: "
            "update siglip-train"
        )
    where = folder / "config.json"
    export = section(_Export, content, where)
    towers = section(_Towers, export.model, where, "model")
    file = section(_Tokenizer, export.tokenizer, where, "tokenizer").file
    if file not in (None, "."):
        check_file_name(file, where)
    rules = {name: value for name, value in export.tokenizer.items() if name != "file"}
    return Description(
        SiglipConfig(towers.vision, towers.text),
        tokenizer=None if file is None else folder / file,
        rules=build(TextRules, rules, f"{where}: tokenizer"),
        resize=export.image.resize,
    )


def check_fit(
    state: Mapping[str, Tensor], config: SiglipConfig, *, where: Path, skip: Sequence[str] = ()
) -> None:
    """Raise a `UserError` that names every tensor which is missing, unexpected or of another shape, and not skipped."""
    shapes = {
        name: shape for name, shape in parameter_shapes(config).items() if not name.startswith(tuple(skip))
    }
    state = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(skip))}
    wrong = {name for name in shapes.keys() & state.keys() if state[name].shape != shapes[name]}
    complain(
        where, missing=shapes.keys() - state.keys(), unexpected=state.keys() - shapes.keys(), misshapen=wrong
    )


def complain(where: Path, **problems: set[str]) -> None:
    """Raise a `UserError` with the tensors of each problem; nothing if there are none."""
    found = [f"{problem}: {shortened(names)}" for problem, names in problems.items() if names]
    if found:
        raise UserError(f"the weights in {where} do not fit their config; {'; '.join(found)}")


def tokenizer_in(folder: Path) -> Path | None:
    """`folder`, or `tokenizer` in it, whichever holds a tokenizer."""
    found = (f for f in (folder, folder / TOKENIZER_FOLDER) if any(any(f.glob(p)) for p in _TOKENIZERS))
    return next(found, None)


def stored_rules(folder: Path) -> TextRules | None:
    """The text rules that a conversion of ours wrote beside its tokenizer; None in anyone else's folder."""
    for path in (folder / "tokenizer_config.json", folder / TOKENIZER_FOLDER / "tokenizer_config.json"):
        rules = section(_TokenizerConfig, read_json(path), path).text_rules if path.is_file() else None
        if rules is not None:
            return rules
    return None


def copy_tokenizer(source: Path, target: Path) -> str:
    """Copy a tokenizer and the files beside it that name its special tokens; the name to load it by."""
    if source.is_dir():
        files = [file for pattern in (*_TOKENIZERS, *_TOKENIZER_COMPANIONS) for file in source.glob(pattern)]
        name = "."
    else:
        companions = [source.with_name(name) for name in _TOKENIZER_COMPANIONS]
        files = [source, *(file for file in companions if source.suffix == ".json" and file.is_file())]
        # an own name, so that it cannot meet the config.json of the export
        name = "tokenizer" + source.suffix
    for file in files:
        shutil.copyfile(file, target / (name if file == source else file.name))
    return name
