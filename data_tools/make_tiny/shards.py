"""Write the samples of one shard; a pure function of the seed, so any process may write any shard."""

import io
import json
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from data_tools.make_tiny.captions import Description, word_everywhere
from data_tools.make_tiny.drawing import draw_scene
from data_tools.make_tiny.languages import SHARES
from data_tools.make_tiny.scenes import Scene, plan_referring, plan_scene, plan_single
from data_tools.make_tiny.truth import true_captions
from data_tools.make_tiny.vocabulary import CLASS_INDEX, HELD_OUT, SEEN
from siglip_train.files.atomic import appearing

SAMPLES_PER_SHARD = 500
# extension, Pillow format, options, share
ENCODINGS: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("jpg", "JPEG", {"quality": 92}, 0.90),
    ("png", "PNG", {"compress_level": 4}, 0.05),
    ("webp", "WEBP", {"quality": 90, "method": 1}, 0.05),
)
Member = tuple[str, bytes]  # file name, content


@dataclass(frozen=True)
class ShardTask:
    """Samples `start` to `stop` of a split, to be written to `path`; several_share: as in `plan_training`."""

    path: Path
    split: str
    seed: int
    start: int
    stop: int
    several_share: float = 0.0


def sample_random(seed: int, split: str, index: int) -> Random:
    """The random stream of one sample; a string seed is hashed, so neighbours do not correlate."""
    return Random(f"{seed}/{split}/{index}")


def plan_training(seed: int, index: int, several_share: float = 0.0) -> Scene:
    """A training scene. Of two single objects in five the caption says the shape alone.

    Where every caption names the colour, a model tells most pairs of a batch apart by it, and takes several times as
    many samples to see shapes.

    several_share: so many of the scenes have two to four objects, no two alike; of the others three in ten do.
    """
    random = sample_random(seed, "train", index)
    if several_share and random.random() < several_share:
        return plan_referring(random, SEEN)
    scene = plan_scene(random)
    if len(scene.things) == 1 and random.random() < 0.4:
        return replace(scene, description=Description(scene.description.groups, shape_alone=True))
    return scene


def plan_validation(seed: int, count: int) -> list[Scene]:
    """Scenes of which no two show the same objects, so that a caption has one right image."""
    scenes: list[Scene] = []
    known = set()
    index = 0
    while len(scenes) < count:
        scene = plan_scene(sample_random(seed, "validation", index))
        content = frozenset(scene.description.groups)
        if content not in known:
            known.add(content)
            scenes.append(scene)
        index += 1
    return scenes


def write_shard(task: ShardTask) -> int:
    """Draw and write one shard; return the number of its samples."""
    scenes = plan_validation(task.seed, task.stop) if task.split == "validation" else None
    with (
        appearing(task.path) as partial,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for index in range(task.start, task.stop):
            # a second stream, so that the plan of a scene does not depend on how it is stored
            random = sample_random(task.seed, f"{task.split}/storage", index)
            scene, label = (scenes[index], None) if scenes else _plan(task, index)
            # of what decoders are asked about: all captions that would be true too
            true = true_captions(scene) if task.split.startswith(("validation", "referring")) else None
            for name, content in _members(scene, label, true, random):
                _add(archive, f"{index:07d}.{name}", content)
    return task.stop - task.start


def _plan(task: ShardTask, index: int) -> tuple[Scene, int | None]:
    if task.split == "train":
        return plan_training(task.seed, index, task.several_share), None
    random = sample_random(task.seed, task.split, index)
    pairs = SEEN if task.split.endswith("_seen") else HELD_OUT
    if task.split.startswith("referring"):
        return plan_referring(random, pairs), None
    color, shape = pair = pairs[index % len(pairs)]
    return plan_single(random, pair), CLASS_INDEX[f"{color} {shape}"]


def _members(
    scene: Scene, label: int | None, true: dict[str, list[str]] | None, random: Random
) -> list[Member]:
    image, class_map, boxes = draw_scene(scene)
    captions = word_everywhere(scene.description)
    language = random.choices(tuple(SHARES), tuple(SHARES.values()))[0]
    shares = [share for *_, share in ENCODINGS]
    extension, image_format, options, _ = random.choices(ENCODINGS, shares)[0]
    objects = [
        {
            "label": f"{thing.color} {thing.shape}",
            "color": thing.color,
            "shape": thing.shape,
            "box": [
                round(left / scene.width, 4),
                round(top / scene.height, 4),
                round(right / scene.width, 4),
                round(bottom / scene.height, 4),
            ],
        }
        for thing, (left, top, right, bottom) in zip(scene.things, boxes, strict=True)
    ]
    facts = {
        "language": language,
        "captions": captions,
        "objects": objects,
        "regions": [{"box": each["box"], "text": each["label"], "score": 1.0} for each in objects],
        "background": scene.background,
        "width": scene.width,
        "height": scene.height,
    }
    if true is not None:
        facts["true"] = true
    members = [
        (extension, _encode(image, image_format, options)),
        ("txt", captions[language].encode()),
        ("json", json.dumps(facts, ensure_ascii=False).encode()),
        ("mask.png", _encode(class_map, "PNG", {"compress_level": 4})),
    ]
    return members if label is None else [*members, ("cls", str(label).encode())]


def _encode(image: Image.Image, image_format: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    # TarInfo's defaults (no owner, time 0) are what makes two runs equal byte for byte
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
