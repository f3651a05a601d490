"""The evaluation loader: every sample of a set once, in file order, in equally many equally large batches on all ranks.

It is the one place that fills batches up.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from siglip_train.batch import Images
from siglip_train.data.faults import BadSample, BadSampleLog, SampleError, causes
from siglip_train.data.images import ImageTransform, decode
from siglip_train.data.pipeline import extensions
from siglip_train.data.samples import Field, class_label
from siglip_train.data.select import EVERYTHING, Selection
from siglip_train.data.shards import RawSample, ShardReader, Wanted, short_name, survey
from siglip_train.data.workers import unchanged, worker_options
from siglip_train.errors import UserError

_LANGUAGE_FIELDS = ("json:lang", "json:language")


class Caption(NamedTuple):
    """A text and its language, "" where the data do not say."""

    language: str
    text: str


@dataclass(frozen=True)
class EvaluationSource:
    """An evaluation set.

    shards, image: as in training. text: member or `json:field`; a text, a list of texts, or a mapping of languages
    to them; None = no captions wanted. label: `cls` or `json:field`, an integer; None = no labels wanted.
    max_samples: only the first so many. select: which samples, by key, as in training.
    """

    shards: str | list[str]
    image: str = "jpg;jpeg;png;webp;bmp"
    text: str | None = None
    label: str | None = None
    max_samples: int | None = None
    select: Selection = EVERYTHING


class EvaluationBatch(NamedTuple):
    """B rows, the same number in every batch of every rank; some may be fillers: a black image and nothing else.

    index: `[B]` int64 place in data order, -1 = filler. captions: of each row, [] at fillers and where none are
    wanted. labels: `[B]` int64, -1 at fillers, None where none are wanted. keys: `shard/key`, "" at fillers.
    """

    images: Images
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no one needs here
    captions: list[list[Caption]]
    labels: Tensor | None
    keys: tuple[str, ...]


class _Row(NamedTuple):
    patches: np.ndarray  # uint8 [L, P]
    place: int = -1
    captions: tuple[Caption, ...] = ()
    label: int = -1
    key: str = ""


class _Batches(Dataset):
    """Number of a batch -> that batch of this rank's share, and its bad samples."""

    def __init__(self, reader: ShardReader, source: EvaluationSource, transform: ImageTransform,
                 share: range, batch_size: int) -> None:  # fmt: skip
        self.reader, self.transform, self.share, self.batch_size = reader, transform, share, batch_size
        self.text = Field.parse(source.text) if source.text is not None else None
        self.label = Field.parse(source.label) if source.label is not None else None

    def __getitem__(self, number: int) -> tuple[EvaluationBatch, list[BadSample]]:
        bad: list[BadSample] = []
        places = self.share[number * self.batch_size : (number + 1) * self.batch_size]
        rows = [self._row(place, bad) for place in places]
        rows += [self._filler] * (self.batch_size - len(rows))
        batch = EvaluationBatch(
            self.transform.batch([row.patches for row in rows]),
            torch.tensor([row.place for row in rows]),
            [list(row.captions) for row in rows],
            torch.tensor([row.label for row in rows]) if self.label is not None else None,
            tuple(row.key for row in rows),
        )
        return batch, bad

    @functools.cached_property
    def _filler(self) -> _Row:
        return _Row(self.transform(Image.new("RGB", (1, 1))))

    def _row(self, place: int, bad: list[BadSample]) -> _Row:
        sample = None
        shard, number = self.reader.shards.locate(place)
        try:
            sample = self.reader.read(shard, number)
            return _Row(
                self.transform(decode(sample.members["image"])),
                place,
                _captions(self.text, sample) if self.text is not None else (),
                class_label(self.label, sample) if self.label is not None else -1,
                sample.name,
            )
        except Exception as error:  # as in training, one sample must not end the run
            name = short_name(self.reader.shards.urls[shard])
            bad.append(BadSample.of(name, sample.key if sample else "?", error))
            return self._filler


def _captions(text: Field, sample: RawSample) -> tuple[Caption, ...]:
    found = text.texts(sample)
    if not found:
        raise SampleError("empty caption", f"no text in {text.text}")
    language = ""
    if "json" in sample.members and not all(key for key, _ in found):
        fields = (Field.parse(name).first(sample) for name in _LANGUAGE_FIELDS)
        language = str(next((value for value in fields if value), ""))
    return tuple(Caption(key or language, value) for key, value in found)


class EvaluationLoader:
    """A finite loader that may be iterated again.

    samples: complete samples of the set, over all ranks. counts: `seen` and `bad/<cause>` of this rank so far; rank 0
    also has `excluded/<cause>`.
    """

    def __init__(self, batches: _Batches, samples: int, rows_per_rank: int, workers: int) -> None:
        self.samples = samples
        self.counts: Counter[str] = Counter()
        self._batches, self._rows, self._workers = batches, rows_per_rank, workers
        self._log = BadSampleLog()

    def __len__(self) -> int:
        """Batches of this rank, equally many on all ranks."""
        return math.ceil(self._rows / self._batches.batch_size)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        numbers = range(len(self))
        loader = DataLoader(
            self._batches,
            batch_size=None,
            collate_fn=unchanged,
            sampler=numbers,
            **worker_options(min(self._workers, len(self))),
        )
        for batch, bad in loader:
            self.counts["seen"] += int((batch.index >= 0).sum()) + len(bad)
            for each in bad:
                self.counts[f"bad/{each.cause}"] += 1
                self._log(each)
            yield batch

    def report_excluded(self, excluded: list[BadSample]) -> None:
        """Count and log samples left out before reading, because a member is missing or cut off."""
        for each in excluded:
            self.counts[f"excluded/{each.cause}"] += 1
            self._log(each)

    def picture(self, index: int) -> Image.Image:
        """The RGB original of any sample of the whole set, on any rank."""
        reader = self._batches.reader
        return decode(reader.read(*reader.shards.locate(index)).members["image"])


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
    text = Field.parse(source.text) if source.text is not None else None
    extra = tuple(Field.parse(name).member for name in (source.label, *_LANGUAGE_FIELDS) if name is not None)
    wanted = Wanted(
        extensions(source.image), (text.member,) if text is not None else None, extra, source.select
    )
    (shards,) = survey([source.shards], [wanted], cache_dir=None)
    if len(shards) == 0:
        raise UserError(
            f"no complete sample in the evaluation set {source.shards}"
            f" ({causes(shards.excluded) or 'its shards are empty'})"
        )
    samples = min(len(shards), source.max_samples or len(shards))
    rows = math.ceil(samples / world_size)
    share = range(rank * rows, min((rank + 1) * rows, samples))
    batches = _Batches(ShardReader(shards), source, transform.without_augmentation(), share, batch_size)
    loader = EvaluationLoader(batches, samples, rows, workers)
    if rank == 0:
        loader.report_excluded(shards.excluded)
    return loader
