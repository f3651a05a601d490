"""The evaluation loader: every sample of a set once, in file order, in equally many equally large batches on all ranks.

It is the one place that fills batches up.
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from siglip_train.batch import Images
from siglip_train.data.config import extensions
from siglip_train.data.folders import benchmark_folder, class_folder, class_folder_names
from siglip_train.data.image_file import decode
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.inputs.regions import Region, read_regions
from siglip_train.data.packing.images import read_mask
from siglip_train.data.remote.cache import ShardCache
from siglip_train.data.remote.limits import MAX_PIXELS
from siglip_train.data.remote.locations import check_local, short_name
from siglip_train.data.shards.faults import BadSample, BadSampleLog, causes
from siglip_train.data.shards.fields import Field, no_caption
from siglip_train.data.shards.index_shards import index_shards
from siglip_train.data.shards.labels import labels_of
from siglip_train.data.shards.reader import RawSample, ShardReader, Wanted
from siglip_train.data.shards.select import EVERYTHING, Selection
from siglip_train.data.watchdog import Loss, Verdict, unchanged, watched
from siglip_train.data.workers import worker_options
from siglip_train.errors import SampleError, UserError

_LANGUAGE_FIELDS = ("json:lang", "json:language")


class Caption(NamedTuple):
    """A text and its language, "" where the data do not say."""

    language: str
    text: str


@dataclass(frozen=True)
class EvaluationSource:
    """An evaluation set.

    shards: as in training, a folder in CLIP_benchmark's layout (its test split, or one named), or a folder of classes.
    image: as in training. text: member or `json:field`; a text, a list of texts, or a mapping of languages
    to them; None = no captions wanted. label: `cls` or `json:field`, an integer or a list of all that are right, or
    `npy`, a vector that is not 0 at them; None = no labels wanted. group: `json:field` that names a part of the set.
    regions: `json:field` with a list of boxes and texts, as in training. accepted: fields by names of one's own, each
    with texts that would be right.
    max_samples: only the first so many. select: which samples, by key, as in training. border: pixels cut off at each
    side of an image (ObjectNet frames its images). center: below 1, the share of both sides that is kept, in the
    middle, of the squashed image (few-shot probes keep 224 of 256). max_pixels: larger images count as bad.
    mask: member with a class map as large as the image. crops: the images of a sample are crops x crops squares, as
    `ImageTransform.crops` cuts them.
    """

    shards: str | list[str]
    image: str = "jpg;jpeg;png;webp;bmp"
    text: str | None = None
    label: str | None = None
    group: str | None = None
    regions: str | None = None
    accepted: Mapping[str, str] = field(default_factory=dict)
    max_samples: int | None = None
    select: Selection = EVERYTHING
    border: int = 0
    center: float = 1.0
    max_pixels: int = MAX_PIXELS
    mask: str | None = None
    crops: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, or null for all, got {self.max_samples}")
        if self.border < 0 or self.max_pixels < 1:
            raise ValueError("border must not be negative and max_pixels must be at least 1")
        if not 0 < self.center <= 1:
            raise ValueError(f"center must be above 0 and at most 1, got {self.center}")
        if self.crops < 1:
            raise ValueError(f"crops must be at least 1, got {self.crops}")


class EvaluationBatch(NamedTuple):
    """B rows, the same number in every batch of every rank; some may be fillers: a black image and nothing else.

    index: `[B]` int64 place in data order, -1 = filler. captions: of each row, [] at fillers and where none are
    wanted. labels: of each row those that are right, none at fillers; None where none are wanted. keys: `shard/key`,
    groups: "" at fillers. regions, and accepted texts by name: of each row, where they are wanted. masks: uint8
    `[H, W]` of each row where class maps are wanted, None at fillers. images: crops x crops for each row, one after the
    other.
    """

    images: Images
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no one needs here
    captions: list[list[Caption]]
    labels: list[tuple[int, ...]] | None
    keys: tuple[str, ...]
    groups: tuple[str, ...]
    regions: tuple[tuple[Region, ...], ...] = ()
    accepted: tuple[dict[str, tuple[str, ...]], ...] = ()
    masks: tuple[np.ndarray | None, ...] = ()


class _Row(NamedTuple):
    patches: list[np.ndarray]  # uint8 [L, P], one for each crop
    place: int = -1
    captions: tuple[Caption, ...] = ()
    labels: tuple[int, ...] = ()
    key: str = ""
    group: str = ""
    regions: tuple[Region, ...] = ()
    accepted: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 never written to
    mask: np.ndarray | None = None  # uint8 [H, W]


class Samples(Protocol):
    """The samples of a set by place, wherever they lie; `name` is (shard, key), for those that cannot be read."""

    def __len__(self) -> int: ...

    def read(self, place: int) -> RawSample: ...

    def name(self, place: int) -> tuple[str, str]: ...


class _InShards:
    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader.shards)

    def read(self, place: int) -> RawSample:
        return self.reader.read(*self.reader.shards.locate(place))

    def name(self, place: int) -> tuple[str, str]:
        shard, _ = self.reader.shards.locate(place)
        return short_name(self.reader.shards.urls[shard]), "?"


class _Batches(Dataset):
    """Number of a batch -> that batch of this rank's share, and its bad samples."""

    def __init__(self, samples: Samples, source: EvaluationSource, transform: ImageTransform,
                 share: range, batch_size: int, *, strict: bool = False) -> None:  # fmt: skip
        self.samples, self.transform, self.share, self.batch_size = samples, transform, share, batch_size
        self.strict = strict
        self.text, self.label, self.group, self.regions, self.mask = (
            Field.parse(name) if name is not None else None
            for name in (source.text, source.label, source.group, source.regions, source.mask)
        )
        self.accepted = {name: Field.parse(where) for name, where in source.accepted.items()}
        self.border, self.center, self.max_pixels = source.border, source.center, source.max_pixels
        self.crops = source.crops

    def places(self, number: int) -> range:
        return self.share[number * self.batch_size : (number + 1) * self.batch_size]

    def __getitem__(self, number: int) -> tuple[EvaluationBatch, list[BadSample]]:
        bad: list[BadSample] = []
        rows = [self._row(place, bad) for place in self.places(number)]
        rows += [self._filler] * (self.batch_size - len(rows))
        batch = EvaluationBatch(
            self.transform.batch([crop for row in rows for crop in row.patches]),
            torch.tensor([row.place for row in rows]),
            [list(row.captions) for row in rows],
            [row.labels for row in rows] if self.label is not None else None,
            tuple(row.key for row in rows),
            tuple(row.group for row in rows),
            tuple(row.regions for row in rows),
            tuple(row.accepted for row in rows),
            tuple(row.mask for row in rows),
        )
        return batch, bad

    @functools.cached_property
    def _filler(self) -> _Row:
        return _Row([self.transform(Image.new("RGB", (1, 1)))] * self.crops**2)

    def _row(self, place: int, bad: list[BadSample]) -> _Row:
        sample = None
        try:
            sample = self.samples.read(place)
            original = self.original(sample)
            return _Row(
                self._crops(original),
                place,
                _captions(self.text, sample) if self.text is not None else (),
                labels_of(self.label, sample) if self.label is not None else (),
                sample.name,
                _group(self.group, sample) if self.group is not None else "",
                tuple(read_regions(self.regions, sample)) if self.regions is not None else (),
                {name: _accepted(where, sample) for name, where in self.accepted.items()},
                _class_map(self.mask, sample, original.size) if self.mask is not None else None,
            )
        except Exception as error:  # as in training, one sample must not end the run
            shard, key = self.samples.name(place)
            bad.append(BadSample.of(shard, sample.key if sample else key, error))
            return self._filler

    def _crops(self, original: Image.Image) -> list[np.ndarray]:
        if self.crops == 1:
            return [self.transform(original, self.center)]
        return self.transform.crops(original, self.crops)

    def original(self, sample: RawSample) -> Image.Image:
        original, cut = decode(sample.members["image"], self.max_pixels, strict=self.strict), self.border
        if not cut:
            return original
        if min(original.size) <= 2 * cut:
            raise SampleError("picture too small", f"{original.size} pixels and a border of {cut}")
        return original.crop((cut, cut, original.width - cut, original.height - cut))


def _captions(text: Field, sample: RawSample) -> tuple[Caption, ...]:
    found = text.texts(sample)
    if not found:
        raise no_caption([text], sample)
    language = ""
    if "json" in sample.members and not all(key for key, _ in found):
        fields = (Field.parse(name).first(sample) for name in _LANGUAGE_FIELDS)
        language = str(next((value for value in fields if value), ""))
    return tuple(Caption(key or language, value) for key, value in found)


def _accepted(where: Field, sample: RawSample) -> tuple[str, ...]:
    found = where.texts(sample)
    if not found:
        raise SampleError("nothing accepted", f"{where.text} holds no text")
    return tuple(value for _, value in found)


def _group(group: Field, sample: RawSample) -> str:
    value = group.first(sample)
    if value is None:
        raise SampleError("no group", f"{group.text} is missing")
    return str(value)


def _class_map(mask: Field, sample: RawSample, size: tuple[int, int]) -> np.ndarray:
    if mask.member not in sample.members:
        raise SampleError("no mask", f"{mask.text} is missing")
    found = read_mask(sample.members[mask.member])
    if found.size != size:
        raise SampleError("mask size", "{} x {}, but the image {} x {}".format(*found.size, *size))
    return np.array(found)


class EvaluationLoader:
    """A finite loader that may be iterated again.

    samples: complete samples of the set, over all ranks. counts: `seen` and `bad/<cause>` of this rank so far; rank 0
    also has `excluded/<cause>`.
    """

    def __init__(self, batches: _Batches, samples: int, numbers: range, workers: int) -> None:
        self.samples = samples
        self.counts: Counter[str] = Counter()
        self._batches, self._numbers, self._workers = batches, numbers, workers
        self._log = BadSampleLog()

    def __len__(self) -> int:
        """Batches of this rank, equally many on all ranks."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        stream = watched(self._from, 0, len(self), lost=self._lost)
        with contextlib.closing(stream):
            for batch, bad in stream:
                self.counts["seen"] += int((batch.index >= 0).sum()) + len(bad)
                for each in bad:
                    self.counts[f"bad/{each.cause}"] += 1
                    self._log(each)
                yield batch

    def _from(self, first: int) -> DataLoader:
        return DataLoader(
            self._batches,
            batch_size=None,
            collate_fn=unchanged,
            sampler=self._numbers[first:],
            **worker_options(min(self._workers, len(self) - first)),
        )

    def _lost(self, loss: Loss) -> Verdict:
        places = self._batches.places(self._numbers[loss.number])
        # every sample counts here, so that none is left out
        return Verdict(f"samples {places.start} to {places.stop - 1} of an evaluation set")

    def report_excluded(self, excluded: list[BadSample]) -> None:
        """Count and log samples left out before reading, because a member is missing or cut off."""
        for each in excluded:
            self.counts[f"excluded/{each.cause}"] += 1
            self._log(each)

    def original(self, index: int) -> Image.Image:
        """The RGB original of any sample of the whole set, on any rank."""
        return self._batches.original(self._batches.samples.read(index))


def build_evaluation_loader(
    source: EvaluationSource,
    transform: ImageTransform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> EvaluationLoader:
    """Find and count the shards and make the loader of this rank's contiguous share.  # all ranks

    Raises `UserError` for shards that are missing, unreadable or without a complete sample.
    """
    samples, excluded = _find(source)
    count = min(len(samples), source.max_samples or len(samples))
    rows = math.ceil(count / world_size)
    share = range(rank * rows, min((rank + 1) * rows, count))
    batches = _Batches(samples, source, transform, share, batch_size)
    loader = EvaluationLoader(batches, count, range(math.ceil(rows / batch_size)), workers)
    if rank == 0:
        loader.report_excluded(excluded)
    return loader


def build_image_loader(
    samples: Samples,
    transform: ImageTransform,
    *,
    max_pixels: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> EvaluationLoader:
    """Images of training alone, the ranks taking turns, so that together they go through `samples` in order.

    Row i of batch k is place (k * world_size + rank) * batch_size + i, or a filler where that is bad or beyond the end.
    """
    source = EvaluationSource([], max_pixels=max_pixels)
    batches = _Batches(samples, source, transform, range(len(samples)), batch_size, strict=True)
    turns = math.ceil(len(samples) / (batch_size * world_size))
    return EvaluationLoader(batches, len(samples), range(rank, turns * world_size, world_size), workers)


def check_found(source: EvaluationSource) -> None:
    """Raise `UserError` where shards of a set are not there. Nothing is opened, and nothing remote is asked."""
    benchmark = benchmark_folder(source.shards)
    if benchmark is not None:
        check_local(benchmark.shards())
    elif not class_folder_names(source.shards):
        check_local(source.shards)


def _find(source: EvaluationSource) -> tuple[Samples, list[BadSample]]:
    """Find the samples of a set, and those left out.  # all ranks"""
    benchmark = benchmark_folder(source.shards)
    if benchmark is None:
        folder = class_folder(source.shards, extensions(source.image), source.select)
        if folder is not None:
            if source.text is not None or source.group is not None:
                raise UserError(f"{source.shards} is a folder of classes: it has neither captions nor groups")
            return folder, [
                BadSample(folder.root.name, path, "no image by its ending") for path in folder.others
            ]
    text = Field.parse(source.text) if source.text is not None else None
    fields = (source.label, source.group, source.regions, source.mask, *source.accepted.values())
    fields += _LANGUAGE_FIELDS
    extra = tuple(Field.parse(name).member for name in fields if name is not None)
    wanted = Wanted(
        extensions(source.image), (text.member,) if text is not None else None, extra, source.select
    )
    places = source.shards if benchmark is None else benchmark.shards()
    (shards,) = index_shards([places], [wanted], ShardCache.at(None))
    if len(shards) == 0:
        raise UserError(
            f"no complete sample in the evaluation set {source.shards}"
            f" ({causes(shards.excluded) or 'its shards are empty'})"
        )
    return _InShards(ShardReader(shards)), shards.excluded
