"""The work of a loader's worker: read, decode and tokenise a part of this rank's share of a global batch."""

import copy
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset

from siglip_train.batch import Batch
from siglip_train.data.choices import Choices
from siglip_train.data.inputs.base import Input
from siglip_train.data.mixture import Mixture
from siglip_train.data.order import SourceOrder, sample_generator
from siglip_train.data.remote.cache import UnavailableShardError
from siglip_train.data.remote.events import Event
from siglip_train.data.remote.locations import short_name
from siglip_train.data.shards.faults import BadSample
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample, ShardReader, ShardSet
from siglip_train.data.watchdog import CAUSE, Place
from siglip_train.errors import SampleError, UserError

# samples a worker hands over at once: a large batch is made by all workers, and memory stays bounded
_PIECE = 256
# substitutes tried for one bad sample
_ATTEMPTS = 8
# pieces that may be on their way at once, of all workers together
_TRACKED = 1024
_NOWHERE = -1
# and draws that may meet a failed shard, which cost next to nothing
_FAILED_DRAWS = 64
# bytes; where tensors may begin in shared memory
_ALIGNED = 64
# bytes; a tensor in shared memory takes a connection between worker and main process, a copy of a small one less
_IN_MESSAGE = 1 << 20


# what each input makes of a sample, and its name
_Row = tuple[list[Any], str]


class RankShare(NamedTuple):
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
    """One source, ready to read. inputs: what is made of its samples; all sources have the same ones."""

    name: str
    shards: ShardSet
    order: SourceOrder
    inputs: list[Input]
    reads_image: bool
    language: Field | None
    language_name: str | None
    reader: ShardReader
    max_failed_shards: float

    def substitute(self, slot: int, attempt: int, rng: np.random.Generator) -> int:
        """Another slot to read in place of one that cannot be used; attempt: 1, 2, ..."""
        # of shards that are fetched one close by: it is at hand, or will soon be
        within = self.order.window << (attempt - 1) if self.shards.has_copies else None
        return self.order.elsewhere(slot, rng, within)

    def check_left_out(self) -> None:
        """Raise `UserError` if too many shards could not be counted; on all ranks alike."""
        self._check_unavailable(self.shards.left_out)

    def check_failed(self) -> None:
        """Raise `UserError` if too many shards are unavailable at once, those that were left out among them."""
        self._check_unavailable(self.shards.left_out | self.reader.failed())

    def _check_unavailable(self, failed: dict[str, str]) -> None:
        count = len(self.shards.urls)
        # one of few shards is no reason to stop, unless nothing is left or nothing may fail
        allowed = max(int(self.max_failed_shards * count), count > 1 and self.max_failed_shards > 0)
        if len(failed) > allowed:
            named = "; ".join(f"{short_name(shard)}: {reason}" for shard, reason in list(failed.items())[:5])
            raise UserError(
                f"source {self.name}: {len(failed)} of {count} shards are unavailable, more than"
                f" data.max_failed_shards {self.max_failed_shards} allows: {named}{'; ...' * (len(failed) > 5)}"
            )

    def language_of(self, sample: RawSample) -> str | None:
        if self.language is None:
            return self.language_name
        return str(self.language.first(sample) or "unknown")


@dataclass
class Report:
    """What a worker tells with its piece: counts, bad samples, events of shards, why it gave up ("" = it did not)."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    failure: str = ""


@dataclass
class Piece:
    """What a worker hands over; `batch` is None where it gave up.

    NOTE: its tensors may lie in memory that a later piece takes (`BatchPieces.shared`): copy them before.
    """

    batch: Batch | None
    report: Report

    def __getstate__(self) -> tuple[Batch | None, Report]:
        return self.batch and self.batch.each(_to_send), self.report

    def __setstate__(self, state: tuple[Batch | None, Report]) -> None:
        batch, self.report = state
        self.batch = batch and Batch(tree_map_only(np.ndarray, torch.from_numpy, batch.parts), batch.keys)


def _to_send(tensor: torch.Tensor) -> Any:
    return tensor.numpy() if tensor.nbytes <= _IN_MESSAGE else tensor


class BatchPieces(Dataset):
    """Piece number -> part of this rank's share of a global batch. A pure function, so workers hold no state."""

    def __init__(self, sources: list[Source], mixture: Mixture, share: RankShare) -> None:
        self.sources, self.mixture, self.share = sources, mixture, share
        self.per_batch = -(-share.size // _PIECE)
        # the position that each piece has come to, by which process, and its sample; the main process looks here when
        # workers are lost
        self._reached = torch.full((_TRACKED, 2 + len(Place._fields)), _NOWHERE).share_memory_()
        self.quarantined: frozenset[Place] = frozenset()
        self._space: torch.Tensor | None = None

    def shared(self, count: int) -> "BatchPieces":
        """These pieces for workers, the large parts of every `count`-th in the same memory, one after the other.

        Fresh shared memory for each piece costs 150 µs per image of 224 px, which the system spends on its pages; the
        memory of a piece before, 7. Raises `UserError` where there is not so much.
        """
        rows = -(-self.share.size // self.per_batch)
        most = sum(-(-rows * each.row_bytes // _ALIGNED) * _ALIGNED for each in self.sources[0].inputs)
        pieces = copy.copy(self)
        if most > _IN_MESSAGE:
            try:
                pieces._space = torch.empty(count, most, dtype=torch.uint8).share_memory_()
            except RuntimeError as error:
                raise UserError(
                    f"no {count * most / 2**30:.1f} GiB of shared memory for the images that workers hold ready:"
                    " lower data.workers or data.prefetch, or allow more (of a container: --shm-size);"
                    f" {str(error).splitlines()[0]}"
                ) from error
        return pieces

    def _bounds(self, number: int) -> tuple[int, int]:
        batch, piece = divmod(number, self.per_batch)
        start = batch * self.share.global_batch_size + self.share.rank * self.share.size
        begin, end = (start + self.share.size * part // self.per_batch for part in (piece, piece + 1))
        return begin, end

    def where(self, batch: int) -> str:
        """What a worker that did not finish its piece of this batch was at, for messages; before `at_hand`."""
        numbers = range(batch * self.per_batch, (batch + 1) * self.per_batch)
        begin, end = self._bounds(numbers[0])[0], self._bounds(numbers[-1])[1]
        reached = [self._reached[number % _TRACKED].tolist() for number in numbers]
        at = [(position, Place(*place)) for position, _, *place in reached if begin <= position < end]
        if not at:
            return f"samples {begin} to {end - 1} of the run"
        position, place = at[0]
        return f"sample {position} of the run, {self.name(place)}"

    def at_hand(self, batch: int, dead: frozenset[int]) -> list[Place]:
        """The samples that these processes were at, or, where none has ended, all that this batch waits for."""
        first = batch * self.per_batch
        rows = [self._reached[number % _TRACKED].tolist() for number in range(first, first + self.per_batch)]
        if dead:
            rows = [row for row in self._reached.tolist() if row[1] in dead]
        self._reached.fill_(_NOWHERE)
        return [Place(*place) for position, _, *place in rows if position != _NOWHERE]

    def name(self, place: Place) -> str:
        """`SHARD/KEY of source NAME`."""
        source = self.sources[place.source]
        key = source.reader.key(place.shard, place.number)
        return f"{short_name(source.shards.urls[place.shard])}/{key} of source {source.name}"

    def __getitem__(self, number: int) -> Piece:
        begin, end = self._bounds(number)
        reached = self._reached.numpy()
        report = Report()
        sources, slots = self.mixture.slots(begin, end)
        try:
            rows = []
            for position, source, slot in zip(
                range(begin, end), sources.tolist(), slots.tolist(), strict=True
            ):
                reached[number % _TRACKED, :2] = position, os.getpid()
                rows.append(self._row(position, source, slot, report, reached[number % _TRACKED, 2:]))
        except UserError as error:
            report.failure = str(error)
            return Piece(None, report)
        finally:
            report.events += self.sources[0].shards.cache.events.drain()
        memory = _Memory(None if self._space is None else self._space[number % len(self._space)])
        columns = zip(self.sources[0].inputs, zip(*(values for values, _ in rows), strict=True), strict=True)
        parts = {each.part: each.collate(list(column), memory.empty) for each, column in columns}
        reached[number % _TRACKED] = _NOWHERE
        return Piece(Batch(parts, tuple(key for _, key in rows)), report)

    def _row(self, position: int, number_of_source: int, slot: int, report: Report, at: np.ndarray) -> _Row:
        """What the inputs make of the sample of a position, and its name; at: takes which one is being read."""
        source = self.sources[number_of_source]
        rng = sample_generator(self.mixture.seed, position)
        bad, failed = 0, 0
        while bad <= _ATTEMPTS and failed <= _FAILED_DRAWS:
            shard, number = source.order.locate(slot)
            at[:] = place = Place(number_of_source, int(shard), int(number))
            sample, key = None, "?"
            try:
                if place in self.quarantined:
                    key = source.reader.key(shard, number)
                    raise SampleError(CAUSE, "left out")
                sample = source.reader.read(shard, number, image=source.reads_image)
                choices = Choices(rng)
                for each in source.inputs:
                    each.decide(sample, choices)
                row = [each.make(sample, choices) for each in source.inputs], sample.name
            except UnavailableShardError as error:
                source.check_failed()
                failed += 1
                last = f"of shard {short_name(source.shards.urls[shard])}, {error.detail}"
            except Exception as error:  # whatever is wrong with one sample must not end the run
                name = short_name(source.shards.urls[shard])
                report.bad.append(BadSample.of(name, sample.key if sample else key, error))
                bad += 1
                last = str(report.bad[-1])
            else:
                report.counts.update(_counted(source, sample, bad + failed))
                report.counts.update({f"failed/{source.name}": 1} if failed else ())
                return row
            slot = source.substitute(slot, bad + failed, rng)
        raise UserError(
            f"source {source.name}: {bad + failed} samples in a row are unusable, the last {last};"
            f" check data.sources.{source.name}"
        )


class _Memory:
    """Memory for the tensors of a piece, one behind the other; fresh memory where there is none, or no more."""

    def __init__(self, space: torch.Tensor | None) -> None:
        self._space, self._used = space, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with anything in it."""
        end = self._used + math.prod(shape) * dtype.itemsize
        if self._space is None or end > len(self._space):
            return torch.empty(shape, dtype=dtype)
        taken = self._space[self._used : end]
        self._used = -(-end // _ALIGNED) * _ALIGNED
        return taken.view(dtype).view(shape)


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
