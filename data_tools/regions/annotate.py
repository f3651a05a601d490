"""Annotate the samples of a shard: draw them, ask the detector, and write all of them again."""

import collections
import functools
import hashlib
import json
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch
from PIL import Image

from data_tools.regions.detector import Detector, Limits, regions_of
from data_tools.regions.known_boxes import KnownBoxes
from data_tools.regions.owl import Owl
from data_tools.regions.pace import Pace, Work
from data_tools.regions.queries import n_grams, names_a_thing
from data_tools.shared.reading import read_rows
from data_tools.shared.writing import exact_key, with_fact
from siglip_train.data.image_file import decode
from siglip_train.data.packing.shards import add_member
from siglip_train.data.shards.faults import BadSample, plain_detail
from siglip_train.data.shards.fields import Field, read_facts
from siglip_train.data.shards.reader import RawSample, indexed_tar, short_name
from siglip_train.errors import SampleError
from siglip_train.files.atomic import appearing, write_whole
from siglip_train.files.lock import lock

# threads of a process that decode images while the detector works
_DECODERS = 4

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Wanted(NamedTuple):
    """What to annotate, and how; the shards written depend on it and the samples alone.

    detector: a folder, or `json:FIELD` of known boxes. text: fields of captions. share: of the samples, drawn by key.
    categories: asked for in every image. any_caption: take captions too that name no thing.
    """

    detector: str
    text: tuple[str, ...] = ("txt",)
    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    field: str = "regions"
    share: float = 1.0
    categories: tuple[str, ...] = ()
    stop_words: frozenset[str] = frozenset()
    longest: int = 10
    caption_words: int = 64
    any_caption: bool = False
    min_score: float = 0.3
    overlap: float = 0.5
    full_precision: bool = False
    max_pixels: int = 0


class AnnotateTask(NamedTuple):
    """The shard `url` is written to the tar `path`, and then what became of it to `report`.

    cache: where downloads are. locks: folder in which processes agree on their devices. work: of the whole run, None =
    of a task whose process says nothing of the time.
    """

    url: str
    cache: Path
    path: Path
    report: Path
    wanted: Wanted
    batch: int
    locks: Path
    work: Work


@dataclass
class Annotated:
    """What became of the samples of a shard.

    drawn: those of the share. without_noun: of these, those whose captions name nothing. annotated: those that the
    detector has seen; with_regions: of these, those with one at least. regions: by their origin. bad: samples passed on
    as they were.
    """

    samples: int = 0
    drawn: int = 0
    without_noun: int = 0
    annotated: int = 0
    with_regions: int = 0
    regions: Counter[str] = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it; that it is there means that the shard is complete."""
        write_whole(path, json.dumps(vars(self)))

    @classmethod
    def load(cls, path: Path) -> "Annotated":
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        bad, regions = map(content.pop, ("bad", "regions"))
        return cls(**content, regions=Counter(regions), bad=[BadSample(*each) for each in bad])


class _Asked(NamedTuple):
    """A sample for the detector: its place in the shard, lists of texts by origin, and what `prepare` made."""

    row: int
    texts: dict[str, Sequence[str]]
    prepared: Any


def annotate_shard(task: AnnotateTask) -> int:
    """Write one shard, complete or not at all; return 1. Raises `UserError`."""
    source, index = indexed_tar(task.url, task.cache)
    name = short_name(task.url)
    report = Annotated(samples=len(index))
    rows = [row for row in range(len(index)) if is_drawn(index.key(row), task.wanted.share)]
    report.drawn = len(rows)
    with warnings.catch_warnings():
        # Pillow warns of half the pixels that it allows
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = _find(task, read_rows(source, name, index, rows), rows, report)
    with appearing(task.path) as partial, tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive:
        samples = read_rows(source, name, index, range(len(index)), longest=None)
        for row, sample in enumerate(samples):
            members = sample.members
            if row in found:
                members = with_fact(members, task.wanted.field, found[row])
            key = exact_key(index, row)
            for extension, content in members.items():
                add_member(archive, f"{key}.{extension}", content)
    report.save(task.report)
    return 1


def is_drawn(key: str, share: float) -> bool:
    """Is a sample among the share? The same for the same key, and those of a share are among those of a larger one."""
    digest = hashlib.sha256(b"regions " + key.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _find(
    task: AnnotateTask, samples: Iterable[RawSample], rows: Sequence[int], report: Annotated
) -> dict[int, list[dict[str, Any]]]:
    """The regions of each sample that the detector has seen, by its place in the shard."""
    wanted, detector, pace = task.wanted, _detector(task.wanted, task.locks), _pace(task.locks)
    limits = Limits(wanted.min_score, wanted.overlap)
    found: dict[int, list[dict[str, Any]]] = {}
    batch: list[_Asked] = []
    passed = 0

    def look() -> None:
        nonlocal passed
        answers = detector.find([each.prepared for each in batch], [[*each.texts.values()] for each in batch])
        for asked, by_origin in zip(batch, answers, strict=True):
            found[asked.row] = regions = [
                {**region, "from": origin}
                for (origin, texts), each in zip(asked.texts.items(), by_origin, strict=True)
                for region in regions_of(each, texts, limits)
            ]
            report.regions.update(region["from"] for region in regions)
            report.with_regions += bool(regions)
        report.annotated += len(batch)
        pace.advance(passed / wanted.share, task.work)
        batch.clear()
        passed = 0

    with ThreadPoolExecutor(_DECODERS) as pool:
        ask = functools.partial(_asked, wanted, detector)
        for each in _ahead(pool, ask, zip(rows, samples, strict=True), 2 * task.batch):
            passed += 1
            if isinstance(each, BadSample):
                report.bad.append(each)
            elif each is None:
                report.without_noun += 1
            else:
                batch.append(each)
            if len(batch) == task.batch:
                look()
        if batch:
            look()
    return found


def _asked(wanted: Wanted, detector: Detector, place: tuple[int, RawSample]) -> _Asked | BadSample | None:
    """What to ask of a sample, None where its captions name nothing."""
    row, sample = place
    try:
        # a broken one could not be written again
        read_facts(sample.members)
        captions = [text for name in wanted.text for _, text in Field.parse(name).texts(sample)]
        if not captions:
            raise SampleError("empty caption", f"no text in {', '.join(wanted.text)}")
        if not (wanted.any_caption or names_a_thing(captions, wanted.stop_words)):
            return None
        texts = {
            "caption": n_grams(captions, wanted.longest, wanted.caption_words, wanted.stop_words),
            "categories": wanted.categories,
        }
        data = next((sample.members[each] for each in wanted.image if each in sample.members), None)
        if data is None:
            raise SampleError("no image", f"none of {', '.join(wanted.image)}")
        image = decode(data, wanted.max_pixels, strict=True)
        asked = {origin: each for origin, each in texts.items() if each}
        return _Asked(row, asked, detector.prepare(image, sample)) if asked else None
    except SampleError as error:
        return BadSample(sample.shard, sample.key, error.cause, plain_detail(error.detail))


def _ahead(
    pool: ThreadPoolExecutor, make: Callable[[_Item], _Made], items: Iterable[_Item], depth: int
) -> Iterator[_Made]:
    """`make(item)` of every item in their order, at most `depth` of them made before they are wanted."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(pool.submit(make, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@functools.cache
def _detector(wanted: Wanted, locks: Path) -> Detector:
    """The one of this process."""
    if wanted.detector.startswith("json:"):
        return KnownBoxes(Field.parse(wanted.detector))
    return Owl(Path(wanted.detector), _device(locks), full_precision=wanted.full_precision)


@functools.cache
def _pace(locks: Path) -> Pace:
    """The one of this process; the first process alone says something."""
    return Pace() if _slot(locks).number == 0 else Pace(say=lambda line: None)  # noqa: ARG005


class _Slot(NamedTuple):
    number: int
    held: IO


@functools.cache
def _slot(locks: Path) -> _Slot:
    """A number that no other process of the run has, from 0 on; it has it to its end."""
    number = 0
    while True:
        file = (locks / f"process-{number}").open("a")
        if lock(file):
            return _Slot(number, file)
        file.close()
        number += 1


def _device(locks: Path) -> torch.device:
    """GPUs in turn."""
    count = torch.cuda.device_count()
    if not count:
        return torch.device("cpu")
    return torch.device("cuda", _slot(locks).number % count)


def processes_by_default(detector: str) -> int:
    """One for each GPU; without any, one whose threads use all cores; of known boxes one for each core."""
    if detector.startswith("json:"):
        return len(os.sched_getaffinity(0))
    return max(1, torch.cuda.device_count())
