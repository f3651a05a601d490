"""The README.md of a written model: its sizes, how it was trained as far as the source says, and how to use it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from siglip_train.files.records import read_records
from siglip_train.interop.files import read_json, section
from siglip_train.interop.runs import run_config, run_folder
from siglip_train.interop.usage import usage
from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.vision import VisionConfig

_FRONT = {
    "hf": {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"},
    "open_clip": {"library_name": "open_clip", "pipeline_tag": "zero-shot-image-classification"},
}
_TASKS = {"vision": "image-feature-extraction", "classifier": "image-classification"}
_KINDS = {
    "model": "A sigmoid image-text model (SigLIP).",
    "vision": "The vision tower of a SigLIP model.",
    "classifier": "A classifier of {classes} classes on the averaged tokens of the vision tower of a SigLIP model.",
}
_TAGS = ["siglip", "image-text", "vision"]


@dataclass
class _Record:
    """conversion.json."""

    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class _State:
    """state.json of a checkpoint."""

    step: int
    samples_seen: int


def training_facts(source: Path) -> dict[str, Any]:
    """What the run around a checkpoint, or the record of an earlier conversion, says of the training; else empty.

    Raises `UserError` where a file that says it is damaged; the last line of metrics.jsonl may be.
    """
    record = source / "conversion.json"
    if record.is_file():
        return section(_Record, read_json(record), record).training
    run = run_folder(source)
    if run is None:
        return {}
    config = run_config(run)
    facts = {
        "objectives": ", ".join(name for name, node in (config.get("objectives") or {}).items() if node),
        "data sources": ", ".join((config.get("data") or {}).get("sources") or {}),
        "pairs of a global batch": config.get("global_batch_size"),
        "learning rate": (config.get("optim") or {}).get("lr"),
        "weight decay": (config.get("optim") or {}).get("weight_decay"),
        "started from": config.get("init_from"),
        **_progress(source, run),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def write_card(folder: Path, name: str, config: SiglipConfig, conversion: dict[str, Any]) -> None:
    """Write `README.md`: front matter that hubs read, then the same in words."""
    target, part, facts = conversion["target"], conversion["part"], conversion["training"]
    classes = conversion["classes"]
    front = {**_FRONT.get(target, {}), "tags": _TAGS}
    if part in _TASKS:
        front["pipeline_tag"] = _TASKS[part]
    form = target if part == "model" else part
    use = [
        f"{sentence}\n\n```python\n{code}\n```\n"
        for sentence, code in usage(form, config, name, has_tokenizer=conversion["tokenizer"] is not None)
    ]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        _KINDS[part].format(classes=classes) + "\n",
        _table(_sizes(config, conversion)),
        *(("## Training\n", _table(facts)) if facts else ()),
        f"## Use\n\n`{name}` in the code is the path of this folder.\n",
        *use,
        f"## Conversion\n\n{_comparison(conversion)}\n",
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _progress(source: Path, run: Path) -> dict[str, Any]:
    """How far the checkpoint is, and the last evaluation of the run up to there."""
    pointer = run / "checkpoints" / "LAST"
    newest = [run / "checkpoints" / pointer.read_text(encoding="utf-8").strip()] if pointer.is_file() else []
    states = [folder / "state.json" for folder in (source, source.parent, *newest)]
    state = next((path for path in states if path.is_file()), None)
    if state is None:
        return {}
    progress = section(_State, read_json(state), state)
    facts = {"steps": progress.step, "pairs seen": progress.samples_seen}
    return {**facts, **_last_evaluation(run / "metrics.jsonl", progress.step)}


def _last_evaluation(path: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in read_records(path):
        if record.get("step", 0) <= step:
            found.update({key: _shown(value) for key, value in record.items() if _is_headline(key)})
    return found


def _shown(value: float | None) -> str:
    """A metric; null stands for one that was not finite."""
    return "not finite" if value is None else f"{value:.4g}"


def _is_headline(key: str) -> bool:
    """val/TASK/METRIC of all languages together; ranks and counts are for the report of the run."""
    parts = key.split("/")
    return (
        parts[0] == "val"
        and len(parts) == 3
        and not parts[2].endswith(("_rank", "_loss"))
        and parts[2] != "n"
    )


def _sizes(config: SiglipConfig, conversion: dict[str, Any]) -> dict[str, Any]:
    vision, text = config.vision, config.text
    sizes = {
        "vision": f"width {vision.width}, depth {vision.depth}, {vision.heads} heads, MLP {vision.mlp_dim}",
        "pictures": f"{_extent(vision)}, patches of {vision.patch_size}",
    }
    if conversion["part"] != "model":
        return sizes | {"GELU": vision.gelu}
    return sizes | {
        "GELU": f"{vision.gelu} (vision), {text.gelu} (text)",
        "text": f"width {text.width}, depth {text.depth}, {text.heads} heads, MLP {text.mlp_dim}",
        "tokens": f"{text.context_length} of a vocabulary of {text.vocab_size}",
        "parameters": f"{conversion['parameters'] / 1e6:.1f} M",
    }


def _extent(vision: VisionConfig) -> str:
    if vision.position_grid is None:
        return f"{vision.image_size} x {vision.image_size}"
    return f"of any shape (NaFlex), positions learned on a grid of {vision.position_grid} x {vision.position_grid}"


def _comparison(conversion: dict[str, Any]) -> str:
    whose = (
        conversion["peer"] or "the same program, which read the files back (the library itself was not there)"
    )
    found = [
        f"{name.replace('_', ' ')} {value:.1e}" for name, value in conversion["largest_difference"].items()
    ]
    asked = f"{conversion['pictures']} images"
    if conversion["texts"]:
        asked += f" and {conversion['texts']} texts"
    where = "a unit-norm embedding:" if conversion["part"] != "classifier" else "the"
    if not found:
        return "The outputs of both sides were not compared: the library was not there."
    return (
        f"Compared with {whose} on {asked} before it was given its name: largest difference in "
        f"{where} {', '.join(found)}. What became of each tensor stands in conversion.json."
    )


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])
