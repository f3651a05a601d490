"""Fills the keys that a config leaves null before it is parsed, from the checkpoint that the run starts from.

Sizes (conf/model/auto.yaml), tokenizer, text rules and the filter of resizing are those of `init_from`, or, when a run
goes on, of its own checkpoint; of a run from scratch those of SigLIP 2 B/16. What is not null was set by the user or an
experiment, and stays.
"""

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from siglip_train.data.config import DataConfig
from siglip_train.data.sentences import SentenceConfig
from siglip_train.data.tokenizer import TextRules, load_tokenizer
from siglip_train.errors import UserError
from siglip_train.interop.load import read_description
from siglip_train.interop.native import Description
from siglip_train.interop.runs import newest_checkpoint, run_config
from siglip_train.models.published import of_file
from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.optim import OptimConfig
from siglip_train.typed import REQUIRED, build

# the model of a run that starts from none
_FROM_SCRATCH = "b16"
# what becomes of weights where these sizes are others than the checkpoint's
_RESAMPLED = {"image_size": "positions", "patch_size": "stem and positions"}


class Filled(NamedTuple):
    """A config without open values, and notes on how they were filled: one line each, for the log."""

    values: dict[str, Any]
    notes: list[str]


def fill(values: dict[str, Any]) -> Filled:
    """Fill what a composed config leaves open, from files alone; `values` stay as they are.

    Raises `UserError` where `init_from` names no model, unless the run goes on with a checkpoint of its own.
    """
    values = copy.deepcopy(values)
    _check_groups(values)
    _fill_sources(values)
    resumed, start = _resumed(values), values.get("init_from")
    notes: list[str] = []
    if resumed is not None:
        _fill_from(_own_description(resumed), values)
    elif not _is_open(start):
        described = _described(start)
        notes = _differences(described, values)
        taken = _fill_from(described, values)
        notes = [f"from {start}: {', '.join(taken)}"] * bool(taken) + _skip_absent(described, values) + notes
    else:
        _fill_from(Description(of_file(_FROM_SCRATCH), resize=DataConfig.resize), values)
    _fill_for_the_tower(values)
    return Filled(values, notes)


def _check_groups(values: dict[str, Any]) -> None:
    for path in ("model", "model.vision", "model.text", "text_rules", "data", "optim"):
        group: Any = values
        for name in path.split("."):
            # ~text_rules on the command line takes it away
            group = group.setdefault(name, {})
        if not isinstance(group, dict):
            raise UserError(f"{path}: expected a group of keys, got {group!r}")


def _resumed(values: dict[str, Any]) -> Path | None:
    """The checkpoint whose sizes a resumed run has: its newest. None for a new run."""
    resume, run_dir = values.get("resume"), values.get("run_dir")
    root = run_dir if resume == "auto" else resume
    if not isinstance(root, str):
        return None
    found = newest_checkpoint(Path(root).expanduser())
    return found if (found / "weights" / "config.json").is_file() else None


def _own_description(checkpoint: Path) -> Description:
    """The description of a run's own model, with its tokenizer file or, where that is gone, the run's copy of it."""
    described = read_description(checkpoint)
    run = checkpoint.parent.parent
    recorded = run_config(run).get("tokenizer") if (run / "config.yaml").is_file() else None
    if described.tokenizer is not None:
        own = run / "tokenizer" / described.tokenizer.relative_to(checkpoint / "weights")
        places = [Path(recorded)] if isinstance(recorded, str) else []
        described.tokenizer = next((path for path in (*places, own) if path.exists()), described.tokenizer)
    return described


def _described(start: Any) -> Description:
    path = Path(str(start)).expanduser()
    if not path.exists():
        raise UserError(f"init_from: there is no {start}; give a run or a folder of a trained model")
    return read_description(path)


def _fill_from(described: Description, values: dict[str, Any]) -> list[str]:
    """Fill the nulls that a model can fill; return the names of what was filled, for the log."""
    model, sizes = values["model"], described.config
    if "text." in described.absent:
        # a text tower with initial values is as large as the image tower, as in the papers
        tower = {key: getattr(sizes.vision, key) for key in ("width", "depth", "mlp_dim", "heads", "gelu")}
        sizes.text = replace(TextConfig(), **tower)
    if sizes.vision.position_grid == sizes.vision.grid:
        # the usual table, which has to follow another image size
        sizes.vision.position_grid = None
    taken = [
        name
        for name, group, given in (
            ("image tower", model["vision"], asdict(sizes.vision)),
            ("text tower", model["text"], asdict(sizes.text)),
            ("text rules", values["text_rules"], asdict(described.rules)),
            (f"{described.resize} resizing", values["data"], {"resize": described.resize}),
        )
        if _fill_nulls(group, given)
    ]
    if _is_open(values.get("tokenizer")):
        if described.tokenizer is not None:
            values["tokenizer"] = str(described.tokenizer)
            taken.append(f"tokenizer {described.tokenizer.name}")
        elif not _reads_texts(values):
            values["tokenizer"] = None
    if "text." in described.absent and "text tower" in taken and not _is_open(values.get("tokenizer")):
        _take_vocabulary(values)
    return [name for name in taken if name.partition(" ")[0] not in _towers(described.absent)]


def _towers(absent: tuple[str, ...]) -> list[str]:
    return [name.rstrip(".") for name in absent]


def _fill_nulls(group: dict[str, Any], given: dict[str, Any]) -> list[str]:
    found = [key for key, value in given.items() if value is not None and group.get(key, 0) is None]
    group.update({key: given[key] for key in found})
    return found


def _is_open(value: Any) -> bool:
    return value is None or value == REQUIRED


def _reads_texts(values: dict[str, Any]) -> bool:
    sources = (values["data"].get("sources") or {}).values()
    return not sources or any(
        not isinstance(source, dict) or source.get("text", "txt") is not None for source in sources
    )


def _take_vocabulary(values: dict[str, Any]) -> None:
    """A text tower with initial values has as many tokens as the tokenizer of the run."""
    rules = build(TextRules, values["text_rules"], "text_rules")
    values["model"]["text"]["vocab_size"] = load_tokenizer(values["tokenizer"], rules).vocab_size


def _decoder_sizes(values: dict[str, Any]) -> dict[str, Any]:
    """Those of the text tower, with half its layers, rounded up (SigLIP 2, section 2.2)."""
    sizes = build(SiglipConfig, values["model"], "model")
    text = asdict(sizes.text)
    taken = {name: text[name] for name in ("width", "mlp_dim", "heads", "gelu", "vocab_size")}
    sentences = values["data"].get("sentences") or {}
    length = sentences.get("context_length") or SentenceConfig.context_length
    return {
        **taken,
        "depth": -(-sizes.text.depth // 2),
        "vision_width": sizes.vision.width,
        "context_length": length,
    }


def _skip_absent(described: Description, values: dict[str, Any]) -> list[str]:
    skipped = values.get("init_skip") or []
    lacking = [name for name in described.absent if not name.startswith(tuple(skipped))]
    if not lacking:
        return []
    values["init_skip"] = [*skipped, *lacking]
    return [f"{values['init_from']} has none of {', '.join(lacking)}: these start from initial values"]


def _differences(described: Description, values: dict[str, Any]) -> list[str]:
    """One line for each value that is set and differs from the checkpoint's, where that is no error."""
    vision, theirs = values["model"]["vision"], described.config.vision
    found = [
        f"{key} {vision[key]} instead of {getattr(theirs, key)}: {what} resampled"
        for key, what in _RESAMPLED.items()
        if vision.get(key) not in (None, getattr(theirs, key))
    ]
    tokenizer, own = values.get("tokenizer"), described.tokenizer
    if not _is_open(tokenizer) and own is not None and Path(str(tokenizer)).resolve() != own.resolve():
        found.append(f"tokenizer {tokenizer} instead of {own}")
    return found


def _fill_sources(values: dict[str, Any]) -> None:
    """Give every source the values of `data.source_defaults` that it does not set itself."""
    defaults = values["data"].get("source_defaults") or {}
    for source in (values["data"].get("sources") or {}).values():
        if isinstance(source, dict):
            source.update({key: copy.deepcopy(value) for key, value in defaults.items() if key not in source})


def _fill_for_the_tower(values: dict[str, Any]) -> None:
    """Make heads as wide as the image tower and decoders like the text tower, and choose the rate for that width."""
    width = values["model"]["vision"].get("width")
    for node in (values.get("objectives") or {}).values():
        if isinstance(node, dict):
            _fill_nulls(node, {"width": width})
            if isinstance(node.get("decoder"), dict):
                _fill_nulls(node["decoder"], _decoder_sizes(values))
    optim = values["optim"]
    if optim.get("lr") is None and optim.get("lr_by_width") and isinstance(width, int):
        # the built config has the table's types checked; its own lr is not read
        optim["lr"] = build(OptimConfig, {**optim, "lr": 1.0}, "optim").lr_for(width)
