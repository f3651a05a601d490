"""The work of a loader's worker: read, decode and tokenise a part of this rank's share of a global batch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from siglip_train.batch import Batch, Images
from siglip_train.data.faults import BadSample, SampleError
from siglip_train.data.images import ImageTransform, decode
from siglip_train.data.order import Mixture, SourceOrder, sample_generator
from siglip_train.data.samples import CaptionChoice, Field, class_label
from siglip_train.data.shards import RawSample, ShardReader, ShardSet, short_name
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import UserError

# samples a worker hands over at once: a large batch is made by all workers, and memory stays bounded
_PIECE = 256
# substitutes tried for one bad sample
_ATTEMPTS = 8


class Share(NamedTuple):
    """What part of every global batch this rank takes: positions rank * size and following."""

    global_batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def size(self) -> int:
        """Samples of this rank in a global batch. Raises `UserError` where the ranks do not divide it."""
        if self.global_batch_size % self.world_size:
            raise UserError(
                f"global_batch_size {self.global_batch_size} is not a multiple of the {self.world_size} ranks"
            )
        return self.global_batch_size // self.world_size


@dataclass
class Source:
    """One source, ready to read. All sources have captions or none has, and so with labels."""

    name: str
    shards: ShardSet
    order: SourceOrder
    captions: CaptionChoice | None
    label: Field | None
    language: Field | None
    language_name: str | None
    reader: ShardReader

    def language_of(self, sample: RawSample) -> str | None:
        if self.language is None:
            return self.language_name
        return str(self.language.first(sample) or "unknown")


@dataclass
class Report:
    """What a worker tells with its piece: counts, bad samples, and why it gave up ("" = it did not)."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)
    failure: str = ""


@dataclass
class Piece:
    """What a worker hands over; `batch` is None where it gave up.

    NOTE: no tuple or mapping, because torch pins those item by item: tuples become lists and Counters double.
    """

    batch: Batch | None
    report: Report

    def pin_memory(self) -> "Piece":
        """Called by the DataLoader's pinning thread."""
        if self.batch is None:
            return self
        images, texts, labels = self.batch.images, self.batch.texts, self.batch.labels
        # a piece of training data has no mask
        pinned = Images(images.patches.pin_memory(), images.grid.pin_memory())
        labels = None if labels is None else labels.pin_memory()
        return Piece(self.batch._replace(images=pinned, texts=texts.pin_memory(), labels=labels), self.report)


class _Row(NamedTuple):
    """One finished sample."""

    patches: np.ndarray  # uint8 [L, P]
    caption: str | None
    label: int | None
    key: str


class Pieces(Dataset):
    """Piece number -> part of this rank's share of a global batch. A pure function, so workers hold no state."""

    def __init__(self, sources: list[Source], mixture: Mixture, share: Share, tokenizer: Tokenizer,
                 transform: ImageTransform, max_pixels: int) -> None:  # fmt: skip
        self.sources, self.mixture, self.share = sources, mixture, share
        self.tokenizer, self.transform, self.max_pixels = tokenizer, transform, max_pixels
        self.per_batch = -(-share.size // _PIECE)

    def __getitem__(self, number: int) -> Piece:
        batch, piece = divmod(number, self.per_batch)
        start = batch * self.share.global_batch_size + self.share.rank * self.share.size
        begin, end = (start + self.share.size * part // self.per_batch for part in (piece, piece + 1))
        report = Report()
        sources, slots = self.mixture.slots(begin, end)
        try:
            rows = [
                self._row(position, self.sources[source], slot, report)
                for position, source, slot in zip(
                    range(begin, end), sources.tolist(), slots.tolist(), strict=True
                )
            ]
        except UserError as error:
            report.failure = str(error)
            return Piece(None, report)
        images = self.transform.batch([row.patches for row in rows])
        captions = [row.caption for row in rows if row.caption is not None]
        texts = self.tokenizer(captions) if captions else torch.empty(len(rows), 0, dtype=torch.long)
        labels = [row.label for row in rows if row.label is not None]
        keys = tuple(row.key for row in rows)
        return Piece(Batch(images, texts, keys, torch.tensor(labels) if labels else None), report)

    def _row(self, position: int, source: Source, slot: int, report: Report) -> _Row:
        rng = sample_generator(self.mixture.seed, position)
        for attempt in range(1 + _ATTEMPTS):
            shard, number = source.order.locate(slot)
            sample = None
            try:
                sample = source.reader.read(shard, number)
                row = self._finished(sample, source, rng)
            except Exception as error:  # whatever is wrong with one sample must not end the run
                name = short_name(source.shards.urls[shard])
                report.bad.append(BadSample.of(name, sample.key if sample else "?", error))
                slot = source.order.elsewhere(slot, rng)
                continue
            report.counts.update(_counted(source, sample, attempt))
            return row
        raise UserError(
            f"source {source.name}: {1 + _ATTEMPTS} samples in a row are unusable, the last {report.bad[-1]};"
            f" check data.sources.{source.name}"
        )

    def _finished(self, sample: RawSample, source: Source, rng: np.random.Generator) -> _Row:
        caption = source.captions.draw(sample, rng) if source.captions else None
        label = class_label(source.label, sample) if source.label else None
        image = decode(sample.members["image"], self.max_pixels)
        return _Row(self.transform(image, rng), caption, label, sample.name)


def _counted(source: Source, sample: RawSample, attempt: int) -> Iterator[str]:
    yield f"source/{source.name}"
    if attempt:
        yield "substituted"
    try:
        language = source.language_of(sample)
    except SampleError:
        language = "unknown"
    if language is not None:
        yield f"language/{language}"
