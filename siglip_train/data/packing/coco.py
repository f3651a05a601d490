"""Records of COCO annotations: the captions of an image together, boxes and masks of instances, or expressions.

Expressions (RefCOCO, RefCOCO+, RefCOCOg) as MDETR published them: an entry of `images` for each, with its `caption`.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siglip_train.data.packing.coco_masks import Drawing
from siglip_train.data.packing.records import IMAGE, MASK, Part, Readable, Record, captions_of, key_of
from siglip_train.errors import SampleError, UserError

_LOG = logging.getLogger(__name__)

Annotations = Mapping[str, Any]
# of a map of 8 bits, beside 0
_MAX_CLASSES = 255


@dataclass
class _Said:
    """What the annotations say of one image. shapes: [class, is it a crowd, segmentation]. classes: their names."""

    captions: list[str] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[list[Any]] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)


def is_coco(data: Any) -> bool:
    """Does the content of a JSON file have the two lists that COCO files are made of?"""
    return isinstance(data, dict) and all(
        isinstance(data.get(key), list) for key in ("images", "annotations")
    )


def coco_records(data: Annotations, instances: Annotations | None, image_root: Path) -> list[Record]:
    """A record for every image of `data`, which holds captions or instances, in the order of its list.

    instances: a second file's annotations, whose boxes and masks are added. Annotations that cannot be used follow as
    faults. Raises `UserError`.
    """
    said: dict[int, _Said] = defaultdict(_Said)
    try:
        if _is_referring(data):
            return _referring_records(data, image_root)
        faults = _collect(data, said, captions=True, objects=instances is None)
        if instances is not None:
            faults += _collect(instances, said, captions=False, objects=True)
        is_captioned = any(each.captions for each in said.values())
        return [
            *(
                _record(image, said[image["id"]], image_root, caption_needed=is_captioned)
                for image in data["images"]
            ),
            *faults,
        ]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"the annotations are not what COCO's look like ({reason})") from error


def _is_referring(data: Annotations) -> bool:
    return bool(data["images"]) and {"caption", "original_id"} <= data["images"][0].keys()


def _referring_records(data: Annotations, image_root: Path) -> list[Record]:
    """A record for each image, whose regions are the boxes of all its expressions."""
    boxes: dict[int, list[Any]] = defaultdict(list)
    for annotation in data["annotations"]:
        boxes[annotation["image_id"]].append(annotation["bbox"])
    regions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    images, faults = {}, []
    for place, entry in enumerate(data["images"]):
        name = entry["file_name"]
        images[name] = entry
        found = boxes[entry["id"]]
        if len(found) != 1:
            # RefCOCO means one box by each; of other sets, phrases of one caption have several
            detail = f"{entry['caption']!r:.60} has {len(found)} boxes, and an expression has one"
            faults.append(Record(f"images[{place}]", name, fault=("no box of its own", detail)))
            continue
        box = relative_box(found[0], entry["width"], entry["height"])
        regions[name].append({"box": box, "text": entry["caption"]})
    records = [
        Record(
            key=key_of(name),
            origin=name,
            parts={IMAGE: Part.of_file(str(image_root / name))},
            facts={"image_id": entry["original_id"], "regions": regions[name]},
            caption_needed=False,
        )
        for name, entry in images.items()
        if regions[name]
    ]
    return [*records, *faults]


def _record(image: Annotations, said: _Said, image_root: Path, *, caption_needed: bool) -> Record:
    name = image["file_name"]
    text, facts = captions_of(said.captions)
    parts: dict[str, Readable] = {IMAGE: Part.of_file(str(image_root / name))}
    if said.objects:
        facts["objects"] = said.objects
    if said.shapes:
        facts["classes"] = said.classes
        parts[MASK] = Drawing(name, *said.size, json.dumps(said.shapes).encode())
    return Record(
        key=key_of(name),
        origin=name,
        parts=parts,
        text=text,
        facts={"image_id": image["id"], **facts},
        # of instances alone the boxes are what is learned
        caption_needed=caption_needed,
    )


def _collect(data: Annotations, said: dict[int, _Said], *, captions: bool, objects: bool) -> list[Record]:
    """Add what a file says of each image; the annotations that cannot be used."""
    images = {image["id"]: image for image in data["images"]}
    labels = {category["id"]: category["name"] for category in data.get("categories", ())}
    numbers = _class_numbers(data, labels) if objects else {}
    faults = []
    for place, annotation in enumerate(data["annotations"]):
        try:
            number = annotation["image_id"]
            if number not in images:
                raise SampleError("unknown image", f"of no image of the list: {number!r}")
            if captions and "caption" in annotation:
                said[number].captions.append(annotation["caption"])
            if objects and ("bbox" in annotation or annotation.get("segmentation")):
                said[number].size = _size(images[number])
                _add_object(said[number], annotation, labels, numbers)
        except SampleError as error:
            faults.append(_fault(place, error.cause, error.detail))
        except (KeyError, TypeError, ValueError) as error:
            faults.append(_fault(place, "broken annotation", f"{type(error).__name__}: {error}"))
    return faults


def _fault(place: int, cause: str, detail: str) -> Record:
    name = f"annotations[{place}]"
    return Record(name, name, fault=(cause, detail))


def _size(image: Annotations) -> tuple[int, int]:
    width, height = image.get("width"), image.get("height")
    if not all(isinstance(side, int) and side > 0 for side in (width, height)):
        raise SampleError("no image size", f"{image['file_name']} is {width} x {height} pixels")
    return image["width"], image["height"]


def _class_numbers(data: Annotations, labels: Mapping[int, str]) -> dict[int, int]:
    """Category -> its number in masks: its id where that fits into 8 bits for all of them, else its place from 1 on."""
    if all(isinstance(category, int) and 0 < category <= _MAX_CLASSES for category in labels):
        return {category: category for category in labels}
    if len(labels) <= _MAX_CLASSES:
        return {category: place for place, category in enumerate(labels, 1)}
    if any(isinstance(each, dict) and each.get("segmentation") for each in data["annotations"]):
        _LOG.warning(
            "masks are left out: there are %d categories, and a map of 8 bits has %d",
            len(labels),
            _MAX_CLASSES,
        )
    return {}


def _add_object(
    said: _Said, annotation: Annotations, labels: Mapping[int, str], numbers: Mapping[int, int]
) -> None:
    category, is_crowd = annotation["category_id"], bool(annotation.get("iscrowd"))
    label = labels.get(category, str(category))
    if "bbox" in annotation:
        box = relative_box(annotation["bbox"], *said.size)
        # a box without an area, or beside the image, shows nothing
        if box[0] < box[2] and box[1] < box[3]:
            said.objects.append({"label": label, "box": box, **({"crowd": True} if is_crowd else {})})
    if annotation.get("segmentation") and numbers:
        if category not in numbers:
            raise SampleError("unknown category", f"of no category of the list: {category!r}")
        said.shapes.append([numbers[category], is_crowd, annotation["segmentation"]])
        said.classes[str(numbers[category])] = label


def relative_box(bbox: Sequence[float], width: int, height: int) -> list[float]:
    """Pixels (x, y, w, h) to (x0, y0, x1, y1) in 0..1, cut at the image's edges."""
    left, top, wide, high = bbox
    edges = (left / width, top / height, (left + wide) / width, (top + high) / height)
    return [round(min(max(edge, 0.0), 1.0), 5) for edge in edges]
