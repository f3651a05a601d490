"""What a config leaves to the data is filled in once the ranks have met: held-out tasks, classes, epochs as samples."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from siglip_train.config import Config
from siglip_train.data.config import DataConfig
from siglip_train.data.counting import count_labels, count_samples
from siglip_train.data.packing.in_cache import PackIntoCache
from siglip_train.data.prompts import read_class_names
from siglip_train.errors import UserError
from siglip_train.interop.runs import is_classification
from siglip_train.settings.starting_point import Filled
from siglip_train.typed import build

# of a task whose shards are null: taken from the source it measures a part of
_TAKEN = ("image", "text", "label")


def _ignore() -> None:
    pass


def fill_from_data(
    values: dict[str, Any], config: Config, earlier: dict[str, Any], moved: Callable[[], None] = _ignore
) -> Filled:
    """Fill what `values` leave to the data; `config` is what they parse to so far.  # all ranks

    earlier: the config of the run that goes on, whose classes are kept; {} of a new one. moved: called as long work
    goes on. Raises `UserError` on every rank.
    """
    values, notes = copy.deepcopy(values), list[str]()
    classnames = _pack_folders(values, config, moved)
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
    known = _Classes(earlier, classnames, lambda: len(_numbered(count_labels(data), notes)))
    _fill_classes(values, known, notes)
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


def _pack_folders(values: dict[str, Any], config: Config, moved: Callable[[], None]) -> list[str]:
    """Shards of the sources that are folders; the names of classes that all sources have from there.  # all ranks"""
    names: dict[str, list[str]] = {}
    for name, source in config.data.sources.items():
        names[name] = []
        if source.folder is None:
            continue
        if source.shards is not None:
            raise UserError(
                f"data.sources.{name}: shards and folder are given, and samples lie in one of them"
            )
        packed = PackIntoCache(
            source.folder,
            name,
            config.data.cache_dir,
            workers=max(config.data.worker_count, 1),
            max_bad_share=config.data.max_bad_share,
        )(moved)
        node, names[name] = values["data"]["sources"][name], packed.classnames
        node["shards"] = packed.shards
        if packed.by is not None:
            node["select"] = {"by": packed.by, **(node.get("select") or {})}
    first, *others = names.values()
    for name, found in names.items():
        if found and first and found != first:
            raise UserError(
                f"data.sources.{name}.folder: its classes are {', '.join(found)}, and those of another source "
                f"{', '.join(first)}: the same label would mean two things"
            )
    return first if all(found == first for found in others) else []


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


@dataclass(frozen=True)
class _Classes:
    """What says how many classes there are: the config of an earlier attempt, the names of folders, or counting."""

    earlier: dict[str, Any]
    found: list[str]
    counted: Callable[[], int]


def _fill_classes(values: dict[str, Any], classes: _Classes, notes: list[str]) -> None:
    """Names from their file or from the data, and how many classes there are: as many as names, or labels."""
    for name, node in (values.get("objectives") or {}).items():
        if not is_classification(node):
            continue
        known = (classes.earlier.get("objectives") or {}).get(name) or {}
        names = node.get("classnames")
        if isinstance(names, str) and known.get("classnames") and not Path(names).is_file():
            # a run goes on without what it was started from
            names = known["classnames"]
        names = None if names is None else read_class_names(names)
        node["classnames"] = names = _names_of(name, names, known.get("classnames"), classes.found)
        if node.get("classes") is None:
            node["classes"] = len(names) if names else known.get("classes") or classes.counted()
            notes.append(f"objectives.{name}: {node['classes']} classes")


def _names_of(
    name: str, given: list[str] | None, known: list[str] | None, found: list[str]
) -> list[str] | None:
    """The names of a file where there is one, else those of the folders, which must not contradict."""
    if not found:
        return given
    if given is None and known and found != known:
        raise UserError(
            f"objectives.{name}: the classes of data.sources are now {', '.join(found)}, and the run that goes on has "
            f"{', '.join(known)}: give a new run_dir"
        )
    if given is not None and given != found and sorted(given) == sorted(found):
        raise UserError(
            f"objectives.{name}.classnames: they stand in another order than the labels of data.sources: "
            f"{', '.join(found)}; leave the file out"
        )
    return given or found


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
