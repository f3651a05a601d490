"""From a model in any format to a folder in another: read, fit, write aside, compare both sides, only then rename."""

import functools
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.tokenizer import Tokenizer, load_tokenizer
from siglip_train.errors import UserError
from siglip_train.files.atomic import put_folder
from siglip_train.interop import to_huggingface, to_onnx, to_open_clip
from siglip_train.interop.card import training_facts, write_card
from siglip_train.interop.decoders import read_decoder, write_decoder
from siglip_train.interop.fast_tokenizer import write_fast_tokenizer
from siglip_train.interop.fit import LoadReport, fit_weights
from siglip_train.interop.load import read_model
from siglip_train.interop.native import Description, ModelFiles, write_export
from siglip_train.interop.probe import Answers, Probe, check, differences, make_probe, our_answers
from siglip_train.interop.runs import read_head, read_teachers_tower
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import with_full_table
from siglip_train.objectives.classification import Classification

Target = Literal["native", "hf", "open_clip", "onnx"]
TARGETS: tuple[str, ...] = get_args(Target)
Part = Literal["model", "vision", "classifier"]
PARTS: tuple[str, ...] = get_args(Part)
Weights = Literal["trained", "ema"]
WEIGHTS: tuple[str, ...] = get_args(Weights)
RECORD = "conversion.json"


@dataclass(frozen=True)
class Request:
    """What is wanted beside source and destination.

    part: `vision` = that tower alone, `classifier` = with a classification head of the run on it (both hf).
    tokenizer: a file or folder, instead of the model's own; "none" leaves it out. image_size, patch_size: resample to
    these. images: a folder to compare both sides on, instead of drawn images. objective: the head's name, where
    there are several. class_names: in label order. weights: of the vision tower, those that were trained or `ema`, the
    teacher's moving average of them.
    """

    target: Target
    part: Part = "model"
    tokenizer: str | None = None
    image_size: int | None = None
    patch_size: int | None = None
    pictures: Path | None = None
    objective: str | None = None
    class_names: Sequence[str] | None = None
    weights: Weights = "trained"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"unknown target {self.target}; choose one of {', '.join(TARGETS)}")
        if self.part != "model" and self.target != "hf":
            raise UserError(f"part {self.part} has a form in hf only, not in {self.target}")
        if self.part != "classifier" and (self.objective, self.class_names) != (None, None):
            raise UserError("--objective and --classnames are for --part classifier")
        if self.weights == "ema" and self.part == "classifier":
            raise UserError("--weights ema: a classifier was trained on the trained tower, so take that one")
        for option, size in (("--image-size", self.image_size), ("--patch-size", self.patch_size)):
            if size is not None and size < 1:
                raise UserError(f"{option} must be at least 1, got {size}")


@dataclass
class Conversion:
    """What was done, as it is printed and stored.

    left_out: tensors that the target has no place for. made_up: those of the target that the source lacks.
    peer: the library that was asked; None = it is not installed, and what was written was read back instead.
    largest_difference: in any number of a unit-norm embedding, or of the logits of a classifier. tokenizer: None =
    without one; its tokens have been compared too. training: what is known of it. classes: of the classifier.
    """

    source: str
    source_format: str
    target: str
    part: str
    parameters: int
    weights: LoadReport
    tokenizer: str | None
    left_out: list[str] = field(default_factory=list)
    made_up: list[str] = field(default_factory=list)
    peer: str | None = None
    pictures: int = 0
    texts: int = 0
    largest_difference: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None
    tower: Weights = "trained"


class _Form(NamedTuple):
    """How a target is written, and how the library that opens it is asked."""

    write: Callable[[Path, Mapping[str, Tensor], Description], list[str]]
    answers: Callable[[Path, Probe, SiglipConfig], Answers | None]
    tokens: Callable[[Path, Probe], Tensor | None]
    package: str | None
    is_readable: bool = True  # by ourselves


def convert(source: Path, destination: Path, request: Request) -> Conversion:
    """Write the model at `source` to the folder `destination`, which must not exist.

    Raises `UserError`, and leaves nothing behind, for what cannot be read or has no form in the target, and where
    the two sides do not agree.
    """
    if destination.exists():
        raise UserError(f"{destination} exists; choose another folder or remove it")
    files, report = _fitted(_read(source, request), source, request)
    description, state = files
    head = read_head(source, request.objective) if request.part == "classifier" else None
    decoder = read_decoder(source)
    keeps_decoder = request.target == "native" and request.part == "model"
    tokenizer = _tokenizer(description, request)
    conversion = Conversion(
        source=source.name,
        source_format=description.origin,
        target=request.target,
        part=request.part,
        parameters=sum(tensor.numel() for tensor in state.values()),
        weights=report,
        tokenizer=Path(tokenizer.name).name if tokenizer else None,
        left_out=[name for name in state if _is_left_out(name, request.part)]
        + [f"decoder.{name}" for name in (decoder.state if decoder and not keeps_decoder else ())],
        training=training_facts(source),
        classes=head.classes if head else None,
        tower=request.weights,
    )
    with _aside(destination) as folder:
        form = _form(request, head)
        if tokenizer and request.target != "native":
            write_fast_tokenizer(tokenizer, folder)
        conversion.made_up = form.write(folder, state, description)
        if decoder and keeps_decoder:
            write_decoder(folder, decoder)
        _compare(folder, files, head, form, tokenizer, conversion, pictures=request.pictures)
        (folder / RECORD).write_text(json.dumps(asdict(conversion), indent=2) + "\n", encoding="utf-8")
        write_card(folder, destination.name, description.config, asdict(conversion))
        if request.target == "open_clip":
            to_open_clip.relocate(folder, destination)
    return conversion


def _read(source: Path, request: Request) -> ModelFiles:
    files = read_model(source)
    if request.weights == "trained":
        return files
    return files._replace(state={**files.state, **read_teachers_tower(source)})


def _fitted(files: ModelFiles, source: Path, request: Request) -> tuple[ModelFiles, LoadReport]:
    """The weights at the size that is wanted."""
    vision = files.description.config.vision
    if request.image_size is not None and vision.position_grid is not None:
        raise UserError(
            f"--image-size has nothing to resample in {source}: a NaFlex model reads its positions at any grid"
        )
    wanted = replace(
        vision,
        patch_size=request.patch_size or vision.patch_size,
        image_size=request.image_size or vision.image_size,
    )
    config = replace(files.description.config, vision=wanted)
    state, report = fit_weights(files, config, where=source)
    if request.target != "native":
        text, state = with_full_table(config.text, state)
        config = replace(config, text=text)
    description = replace(files.description, config=config)
    return ModelFiles(description, state), report


def _is_left_out(name: str, part: Part) -> bool:
    if part == "model":
        return False
    return not name.startswith("vision.") or (part == "classifier" and name.startswith("vision.pool."))


def _tokenizer(description: Description, request: Request) -> Tokenizer | None:
    path = request.tokenizer or description.tokenizer
    if path is None or request.tokenizer == "none" or request.part != "model":
        description.tokenizer = None
        return None
    description.tokenizer = Path(path).expanduser()
    text = description.config.text
    tokenizer = load_tokenizer(path, description.rules, text.context_length)
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, the model {text.vocab_size}: they do not belong "
            "together; give the model's own with --tokenizer PATH, or --tokenizer none"
        )
    return tokenizer


@contextmanager
def _aside(destination: Path) -> Iterator[Path]:
    """A folder that gets the name `destination` at the end, or is removed."""
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        put_folder(partial, destination)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {destination}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _form(request: Request, head: Classification | None) -> _Form:
    if request.target == "native":
        return _Form(_write_native, lambda *_: None, lambda *_: None, None)
    if request.target == "open_clip":
        return _Form(
            to_open_clip.write_open_clip,
            lambda folder, probe, _: to_open_clip.open_clip_answers(folder, probe),
            to_open_clip.open_clip_tokens,
            "open_clip_torch",
        )
    if request.target == "onnx":
        return _Form(
            to_onnx.write_onnx, to_onnx.onnxruntime_answers, lambda *_: None, "onnxruntime", is_readable=False
        )
    if head is not None:
        names = request.class_names or head.classnames
        write = functools.partial(to_huggingface.write_classifier, head=head, class_names=names)
        return _Form(
            write, to_huggingface.transformers_logits, lambda *_: None, "transformers", is_readable=False
        )
    is_whole = request.part == "model"
    return _Form(
        to_huggingface.write_huggingface if is_whole else to_huggingface.write_vision_tower,
        to_huggingface.transformers_answers,
        to_huggingface.transformers_tokens,
        "transformers",
        is_readable=is_whole,
    )


def _write_native(folder: Path, state: Mapping[str, Tensor], description: Description) -> list[str]:
    # an export replaces nothing but an export
    folder.rmdir()
    write_export(folder, state, description)
    return []


def _compare(
    folder: Path,
    files: ModelFiles,
    head: Classification | None,
    form: _Form,
    tokenizer: Tokenizer | None,
    conversion: Conversion,
    *,
    pictures: Path | None,
) -> None:
    """Ask both sides; a `UserError` where they differ by more than rounding."""
    config, vision = files.description.config, files.description.config.vision
    transform = ImageTransform(vision.image_size, vision.patch_size, files.description.resize)
    probe = make_probe(config, transform, tokenizer, pictures)
    ours = our_answers(_model(files), probe, head)
    theirs = form.answers(folder, probe, config)
    if theirs is not None:
        conversion.peer = f"{form.package} {importlib.metadata.version(str(form.package))}"
    elif form.is_readable:
        theirs = our_answers(_model(read_model(folder)), probe)
    if theirs is not None:
        conversion.largest_difference = differences(ours, theirs)
        check(conversion.largest_difference, ours, conversion.peer or "the written model")
        conversion.pictures = len(probe.originals)
        conversion.texts = len(theirs.get("text_embedding", ()))
    if tokenizer:
        _check_tokens(folder, form, tokenizer, probe, config=config, is_asked=conversion.peer is not None)


def _model(files: ModelFiles) -> Siglip:
    with torch.device("meta"):
        model = Siglip(files.description.config)
    model.load_state_dict(files.state, assign=True)
    return model.eval()


def _check_tokens(
    folder: Path, form: _Form, tokenizer: Tokenizer, probe: Probe, *, config: SiglipConfig, is_asked: bool
) -> None:
    """Raise a `UserError` unless the tokenizer in `folder` gives the tokens of training.

    is_asked: whether the library that opens the folder is there to be asked.
    """
    wrong = _first_wrong(folder, form, tokenizer, probe)
    is_changed = wrong or not is_asked
    if form.package == "transformers" and is_changed and to_huggingface.family(config) == "Siglip2":
        to_huggingface.keep_tokenizer(folder)
        wrong = _first_wrong(folder, form, tokenizer, probe)
    if wrong:
        raise UserError(
            f"{wrong!r} becomes other tokens in the tokenizer that was written; --tokenizer none leaves it out"
        )


def _first_wrong(folder: Path, form: _Form, tokenizer: Tokenizer, probe: Probe) -> str | None:
    """The first text whose tokens differ."""
    theirs = form.tokens(folder, probe)
    if theirs is None:
        theirs = load_tokenizer(folder, tokenizer.rules, tokenizer.context_length)(probe.texts)
    rows = zip(probe.texts, probe.tokens, theirs, strict=True)
    return next((text for text, mine, other in rows if not torch.equal(mine, other)), None)
