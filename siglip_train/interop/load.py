"""Open a model whatever its format: `load_model` to use it, `load_weights` to start a training from it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.tokenizer import load_tokenizer
from siglip_train.errors import UserError
from siglip_train.files.manifest import check
from siglip_train.interop.big_vision import describe_big_vision, is_big_vision, read_big_vision
from siglip_train.interop.files import refuse_pickle
from siglip_train.interop.fit import LoadReport, fit_weights
from siglip_train.interop.huggingface import (
    CLASSIFIER,
    check_model_type,
    describe_huggingface,
    read_huggingface,
)
from siglip_train.interop.loaded_model import LoadedModel
from siglip_train.interop.native import Description, ModelFiles, describe_export, is_native, read_export
from siglip_train.interop.open_clip import CONFIG_FILE, WEIGHTS_FILE, describe_open_clip, read_open_clip
from siglip_train.interop.runs import newest_checkpoint
from siglip_train.interop.same_inputs import check_inputs
from siglip_train.models.siglip import Siglip

# files of weights that stand for their folder, and the config that has to be there
_CONFIGS = {WEIGHTS_FILE: CONFIG_FILE, "model.safetensors": "config.json"}


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    tokenizer: str | Path | None = None,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
) -> LoadedModel:
    """Open a run (its newest checkpoint), a checkpoint, an export, a HuggingFace or open_clip folder, or an npz.

    device: of torch, or "auto", the GPU where there is one. tokenizer: a tokenizer file or folder, instead of the
    model's own. precision: in which `embed_images` and its like run the towers; auto is bf16 autocast on a GPU, fp32
    elsewhere. The model is in evaluation mode, its weights are fp32.
    Raises `UserError` for anything else, and for damaged or unfitting files.
    """
    path = Path(path).expanduser()
    place = _device(device)
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision={precision} is not known: choose auto, bf16 or fp32")
    if precision == "auto":
        precision = "bf16" if place.type == "cuda" else "fp32"
    description, state = read_model(path)
    config = description.config
    with torch.device("meta"):
        model = Siglip(config)
    model.load_state_dict(state, assign=True)
    tokenizer_path = tokenizer or description.tokenizer
    return LoadedModel(
        model=model.to(place).eval(),
        transform=ImageTransform(config.vision.image_size, config.vision.patch_size, description.resize),
        tokenizer=load_tokenizer(tokenizer_path, description.rules, config.text.context_length)
        if tokenizer_path
        else None,
        source=path,
        precision=precision,
    )


def _device(wanted: str | torch.device) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"device={wanted} is not known: choose auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={wanted}, but torch sees no GPU on this machine: use cpu or auto")
    return device


def read_model(path: Path, skip: Sequence[str] = ()) -> ModelFiles:
    """Description and weights of a model in any format that `load_model` knows.

    skip: beginnings of our names, which may be missing, and of the file's own, which may be left over.
    """
    model_format, place = _format_of(path)
    if place.name == "weights":
        # of a checkpoint
        check(place.parent, within="weights/")
    return model_format.read(place, skip)


def read_description(path: Path) -> Description:
    """Everything but the weights of a model in any format that `load_model` knows, without reading them."""
    model_format, place = _format_of(path)
    return model_format.describe(place)


class _Format(NamedTuple):
    describe: Callable[[Path], Description]
    read: Callable[[Path, Sequence[str]], ModelFiles]


def _format_of(path: Path) -> tuple[_Format, Path]:
    """Whose files these are, and the file or folder to read. Raises `UserError` where they are nobody's."""
    if not path.exists():
        raise UserError(f"there is no model at {path}: the path does not exist")
    path = _snapshot(path)
    if is_big_vision(path):
        return _Format(describe_big_vision, read_big_vision), path
    if path.is_file():
        refuse_pickle(path)
    beside = _CONFIGS.get(path.name) if path.is_file() else None
    if beside and not (path.parent / beside).is_file():
        raise UserError(f"{path} holds weights alone: {beside}, which says their sizes, is not beside it")
    folder = path.parent if beside else _weights_folder(path)
    if beside != "config.json" and ((folder / CONFIG_FILE).is_file() or folder.suffix == ".json"):
        return _Format(describe_open_clip, read_open_clip), folder
    if is_native(folder):
        return _Format(describe_export, read_export), folder
    if (folder / "config.json").is_file():
        check_model_type(folder)
        return _Format(describe_huggingface, read_huggingface), folder
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds adapters of PEFT, not the model that they adapt: merge them where they come from, and give "
            "that FOLDER: PeftModel.from_pretrained(MODEL, ADAPTERS).merge_and_unload().save_pretrained(FOLDER)"
        )
    raise UserError(
        f"{path} is no model: neither a run with a checkpoint, a checkpoint, an export, a HuggingFace folder "
        f"(config.json), an open_clip folder ({CONFIG_FILE}) nor an .npz of big_vision"
    )


def _snapshot(path: Path) -> Path:
    """The snapshot in a folder of the hub's cache (models--OWNER--NAME): that of `main`, or the only one."""
    folder = path / "snapshots"
    if not folder.is_dir():
        return path
    there = {each.name: each for each in folder.iterdir() if each.is_dir()}
    main = path / "refs" / "main"
    named = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    if named in there or len(there) == 1:
        return there.get(named) or next(iter(there.values()))
    raise UserError(
        f"{path} is a folder of the hub's cache with {len(there)} snapshots; give one: {folder}/NAME"
        f"{' of ' + ', '.join(sorted(there)) if there else ''}"
    )


def _weights_folder(path: Path) -> Path:
    """The export folder in a run or a checkpoint; any other path as it is."""
    path = newest_checkpoint(path)
    return path / "weights" if (path / "weights" / "config.json").is_file() else path


def load_weights(
    model: Siglip,
    path: str | Path,
    *,
    resample: bool = True,
    fresh: Sequence[str] = (),
    skip: Sequence[str] = (),
    inputs: Description | None = None,
) -> LoadReport:
    """Start `model` from the weights at `path`, in any format `load_model` knows; an error changes nothing.

    resample: resize position table and stem where image or patch size differ, as `fit_weights` says. fresh:
    beginnings of names that may keep their initial values where no tensor fits. skip: beginnings of names that keep
    them whatever fits, and need not be there; also of names of the file's own that the model has no place for.
    inputs: how the model will get its texts and images, see `check_inputs`; None = that is not compared.
    Raises `UserError` with the names of all other tensors that are missing or of another shape, and where
    heads or activation differ, as such weights would load and mean something else.
    """
    path = Path(path).expanduser()
    files = read_model(path, skip)
    # of the folders with an image tower some have a classifier, and the same command may be for all
    names = (*model.state_dict(), *files.state, CLASSIFIER)
    for beginning in skip:
        if not any(name.startswith(beginning) for name in names):
            raise UserError(
                f"init_skip: no parameter of the model begins with {beginning!r}, nor one of {path}"
            )
    if inputs is not None:
        check_inputs(files.description, inputs, path, skip)
    state, report = fit_weights(files, model.config, where=path, resample=resample, fresh=fresh, skip=skip)
    model.load_state_dict(state, strict=False)
    return report
