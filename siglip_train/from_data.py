"""What a config leaves to the data is filled in once the ranks have met: held-out tasks, classes, epochs as samples."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from siglip_train.config import Config
from siglip_train.data.config import DataConfig
from siglip_train.data.counting import count_labels, count_samples
from siglip_train.data.prompts import read_class_names
from siglip_train.errors import UserError
from siglip_train.interop.runs import is_classification
from siglip_train.starting_point import Filled
from siglip_train.typed import build

# of a task whose shards are null: taken from the source it measures a part of
_TAKEN = ("image", "text", "label")


def fill_from_data(values: dict[str, Any], config: Config, earlier: dict[str, Any]) -> Filled:
    """Fill what `values` leave to the data; `config` is what they parse to so far.  # all ranks

    earlier: the config of the run that goes on, whose classes are kept; {} of a new one. Raises `UserError` on every
    rank.
    """
    values, notes = copy.deepcopy(values), list[str]()
    every = [
        task
        for task in ((values.get("evaluation") or {}).get("tasks") or {}).values()
        if isinstance(task, dict)
    ]
    tasks = [task for task in every if "shards" in task and task["shards"] is None]
    if tasks:
        _hold_out(values, config)
    data = build(DataConfig, values["data"], "data")
    for task in tasks:
        _measure_held_out(task, data)
    for task in every:
        for name in (*_TAKEN, "select"):
            if task.get(name, 0) is None:
                # as its class has it
                del task[name]
    _fill_classes(values, earlier, notes, lambda: len(_numbered(count_labels(data), notes)))
    if config.total_epochs is not None:
        samples = count_samples(data)
        values["total_samples"], values["total_epochs"] = (
            round(config.total_epochs * sum(samples.values())),
            None,
        )
        notes.append(
            f"total_epochs={config.total_epochs:g} of {sum(samples.values()):,} samples: "
            f"total_samples={values['total_samples']}"
        )
    return Filled(values, notes)


def _hold_out(values: dict[str, Any], config: Config) -> None:
    """Sources that do not say themselves how much of them is held out lose `evaluation.held_out`."""
    for source in values["data"]["sources"].values() if config.evaluation.held_out else ():
        select = source.get("select") or {}
        source["select"] = {"held_out": config.evaluation.held_out, "part": "train", **select}


def _measure_held_out(task: dict[str, Any], data: DataConfig) -> None:
    """Shards, members and the other part of the samples, which all sources must have alike."""
    sources = list(data.sources.values())
    for name in _TAKEN:
        if name in task and task[name] is None:
            found = _alike([getattr(source, name) for source in sources], name)
            # of fields with probabilities the likeliest
            task[name] = max(found, key=lambda field: found[field]) if isinstance(found, dict) else found
    selection = _alike([source.select for source in sources], "select")
    if not selection.held_out:
        raise UserError(
            "evaluation: a task without shards measures what is held out of data.sources, and nothing is: set "
            "evaluation.held_out=0.2, or evaluation.tasks.NAME.shards=…"
        )
    shards = [source.shards for source in sources]
    task["shards"] = shards[0] if len(shards) == 1 else [each for spec in shards for each in _listed(spec)]
    task["select"] = {**asdict(selection), "part": "held_out"}


def _alike(found: list[Any], name: str) -> Any:
    if any(value != found[0] for value in found):
        raise UserError(
            f"evaluation: a task without shards measures all data.sources together, which differ in {name}: give "
            "evaluation.tasks.NAME.shards=…"
        )
    return found[0]


def _listed(spec: Any) -> list[str]:
    return [spec] if isinstance(spec, str) else list(spec)


def _fill_classes(
    values: dict[str, Any], earlier: dict[str, Any], notes: list[str], count: Callable[[], int]
) -> None:
    """Names from their file, and how many classes there are: as many as names, or labels."""
    for name, node in (values.get("objectives") or {}).items():
        if not is_classification(node):
            continue
        known = (earlier.get("objectives") or {}).get(name) or {}
        names = node.get("classnames")
        if isinstance(names, str) and known.get("classnames") and not Path(names).is_file():
            # a run goes on without what it was started from
            names = known["classnames"]
        node["classnames"] = names = None if names is None else read_class_names(names)
        if node.get("classes") is None:
            node["classes"] = len(names) if names else known.get("classes") or count()
            notes.append(f"objectives.{name}: {node['classes']} classes")


def _numbered(labels: dict[int, int], notes: list[str]) -> range:
    """Every class from 0 to the largest label. Raises `UserError` where there is none."""
    if not labels:
        raise UserError(
            "objectives: no sample has a label to count the classes by; check data.sources.NAME.label"
        )
    classes = range(max(labels) + 1)
    missing = len(classes) - len(labels)
    if missing:
        notes.append(f"{missing} of the labels 0 to {max(labels)} stand at no sample")
    return classes
