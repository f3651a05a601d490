"""Records of COCO annotations: the captions of a picture together, and boxes of instances relative to its sides."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.packing.records import IMAGE, Part, Record, captions_of, key_of
from siglip_train.errors import UserError

Annotations = Mapping[str, Any]


def is_coco(data: Any) -> bool:
    """Does the content of a JSON file have the two lists that COCO files are made of?"""
    return isinstance(data, dict) and all(
        isinstance(data.get(key), list) for key in ("images", "annotations")
    )


def coco_records(data: Annotations, instances: Annotations | None, image_root: Path) -> list[Record]:
    """A record for every picture of `data`, which holds captions or instances, in the order of its list.

    instances: a second file's annotations, whose boxes are added. Raises `UserError`.
    """
    try:
        captions = _captions(data)
        objects = _objects(instances if instances is not None else data)
        return [_record(image, captions, objects, image_root) for image in data["images"]]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"the annotations are not what COCO's look like ({reason})") from error


def _record(image: Annotations, captions: Mapping[int, list[str]], objects: Mapping[int, list[dict]],
            image_root: Path) -> Record:  # fmt: skip
    name, number = image["file_name"], image["id"]
    text, facts = captions_of(captions.get(number, []))
    if number in objects:
        facts["objects"] = objects[number]
    return Record(
        key=key_of(name),
        origin=name,
        parts={IMAGE: Part(str(image_root / name))},
        text=text,
        facts={"image_id": number, **facts},
        # of instances alone the boxes are what is learned
        caption_needed=bool(captions),
    )


def _captions(data: Annotations) -> dict[int, list[str]]:
    captions = defaultdict(list)
    for annotation in data["annotations"]:
        if "caption" in annotation:
            captions[annotation["image_id"]].append(annotation["caption"])
    return dict(captions)


def _objects(data: Annotations) -> dict[int, list[dict]]:
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"] if "width" in image}
    labels = {category["id"]: category["name"] for category in data.get("categories", ())}
    objects = defaultdict(list)
    for annotation in data["annotations"]:
        if "bbox" not in annotation:
            continue
        number = annotation["image_id"]
        box = _relative(annotation["bbox"], *sizes[number])
        # a box without an area, or beside the picture, shows nothing
        if box[0] < box[2] and box[1] < box[3]:
            label = labels.get(annotation["category_id"], str(annotation["category_id"]))
            crowd = {"crowd": True} if annotation.get("iscrowd") else {}
            objects[number].append({"label": label, "box": box, **crowd})
    return dict(objects)


def _relative(bbox: list[float], width: int, height: int) -> list[float]:
    """Pixels (x, y, w, h) to (x0, y0, x1, y1) in 0..1, cut at the picture's edges."""
    left, top, wide, high = bbox
    edges = (left / width, top / height, (left + wide) / width, (top + high) / height)
    return [round(min(max(edge, 0.0), 1.0), 5) for edge in edges]
