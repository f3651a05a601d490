"""Which classes are right for an image: one, several (ReaL), or those that its own stands for (ObjectNet)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_train.errors import UserError
from siglip_train.files.atomic import read_text

LabelSet = tuple[int, ...]
# entry i of a list such as ReaL's is about image i + 1 of ImageNet's validation set
_VALIDATION_KEY = re.compile(r"val_0*(\d+)$")


class Truth(NamedTuple):
    """What is right for the images of a set.

    rows: the n images that count. candidates: `[C]` the classes that may be predicted. targets: `[n, S]` those that
    are right, as places in candidates, filled up with -1. owners: `[n]` the class each image is of in the set's own
    terms, by number; None where an image has several. names: of the owners.
    """

    rows: list[int]
    candidates: Tensor
    targets: Tensor
    owners: Tensor | None
    names: Mapping[int, str]


def labelled_truth(labels: Sequence[LabelSet], keys: Sequence[str], names: Sequence[str]) -> Truth:
    """Any label of an image is right; one without a label does not count. Raises UserError for a label without name."""
    for key, each in zip(keys, labels, strict=True):
        outside = [label for label in each if not 0 <= label < len(names)]
        if outside:
            raise UserError(
                f"label {outside[0]} of sample {key} has no class name: "
                f"classnames names {len(names)} classes, so labels are 0..{len(names) - 1}"
            )
    rows = _counted(labels)
    targets = target_tensor([labels[row] for row in rows])
    owners = targets[:, 0] if targets.shape[1] == 1 else None
    return Truth(rows, torch.arange(len(names)), targets, owners, dict(enumerate(names)))


def mapped_truth(
    labels: Sequence[LabelSet], class_map: Mapping[str, LabelSet], folders: Mapping[int, str], classes: int
) -> Truth:
    """Every class that the image's own stands for is right; those that none stands for are not predicted.

    folders: names of the set's own classes by label, where it has some. Raises UserError for classes from `classes` on.
    """
    candidates = sorted({to for each in class_map.values() for to in each})
    if not candidates or not 0 <= candidates[0] <= candidates[-1] < classes:
        raise UserError(
            f"class_map: classes {candidates[:1]}..{candidates[-1:]}, but names for {classes} of them"
        )
    place = {label: position for position, label in enumerate(candidates)}
    own = {label: folders.get(label, str(label)) for each in labels for label in each}
    sets = [tuple(place[to] for label in each for to in class_map.get(own[label], ())) for each in labels]
    rows = _counted(sets)
    owners = torch.tensor([labels[row][0] for row in rows])
    return Truth(rows, torch.tensor(candidates), target_tensor([sets[row] for row in rows]), owners, own)


def _counted(labels: Sequence[LabelSet]) -> list[int]:
    rows = [row for row, each in enumerate(labels) if each]
    if not rows:
        raise UserError(f"none of {len(labels)} images has a label that counts")
    return rows


def target_tensor(labels: Sequence[LabelSet]) -> Tensor:
    """Sets of labels as `[n, S]` int64, filled up with -1."""
    longest = max(len(each) for each in labels)
    return torch.tensor([[*each, *[-1] * (longest - len(each))] for each in labels])


def read_label_sets(path: str, keys: Sequence[str]) -> list[LabelSet]:
    """Give the labels of each image from a file: `{key: [label, …]}`, or a list as `real.json` of ImageNet-ReaL.

    keys: `shard/key` or longer paths; their last part counts. An image that the file does not name has no label.
    Raises UserError where no key, or for a list any key, is one that the file can know.
    """
    content = read_json(path)
    names = [key.rsplit("/", 1)[-1] for key in keys]
    if isinstance(content, list):
        numbers = [_validation_number(name, path) for name in names]
        sets = [content[number] if number < len(content) else [] for number in numbers]
    elif isinstance(content, dict):
        sets = [content.get(name, []) for name in names]
    else:
        raise UserError(f"label_sets: {path} holds neither a list nor an object of labels by key")
    if not any(sets):
        raise UserError(f"label_sets: {path} names none of the {len(names)} images, such as {names[0]!r}")
    return [_as_labels(each, path) for each in sets]


def _validation_number(name: str, path: str) -> int:
    found = _VALIDATION_KEY.search(name)
    if found is None or int(found[1]) == 0:
        raise UserError(
            f"label_sets: {path} is a list in the order of ILSVRC2012_val_00000001 and following, but a sample has "
            f"the key {name!r}: keep the files' names as keys, or give an object {{key: [label, …]}}"
        )
    return int(found[1]) - 1


def read_class_map(path: str) -> dict[str, LabelSet]:
    """Give the classes that each class of the set stands for, by its folder's name or its number as text.

    path: a file `{class: label or [label, …]}`, or the folder `mappings` that comes with ObjectNet.
    """
    if Path(path).is_dir():
        return _read_objectnet(Path(path))
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"class_map: {path} holds no object {{class: label or [label, …]}}")
    return {name: _as_labels(labels, path) for name, labels in content.items()}


def _read_objectnet(folder: Path) -> dict[str, LabelSet]:
    """Join ObjectNet's tables: folder -> its name -> names in ImageNet, `; ` between them -> their numbers."""
    folders = read_json(folder / "folder_to_objectnet_label.json")
    names = read_json(folder / "objectnet_to_imagenet_1k.json")
    lines = read_text(folder / "imagenet_to_label_2012_v2").splitlines()
    # the lines are in the order of 2012's ids, everyone's class lists in the order of WordNet's
    order = read_json(folder / "pytorch_to_imagenet_2012_id.json")
    try:
        numbers = {lines[line].strip(): int(label) for label, line in order.items()}
        return {
            place: tuple(numbers[each.strip()] for each in names[name].split("; "))
            for place, name in folders.items()
            if name in names
        }
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"class_map: the files in {folder} are not ObjectNet's, or damaged: {error!r}"
        ) from None


def _as_labels(value: Any, path: str) -> LabelSet:
    values = value if isinstance(value, list) else [value]
    if any(type(each) is not int for each in values):
        raise UserError(f"{path}: {value!r} is neither a label nor a list of labels")
    return tuple(values)


def read_json(path: str | Path) -> Any:
    """Give the content of a JSON file. Raises UserError where it cannot be read or is none."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
