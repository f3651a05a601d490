"""The training loader: an endless, resumable stream of `Batch`, this rank's share of every global batch."""

import contextlib
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from siglip_train.batch import Batch, join
from siglip_train.data.batch_pieces import BatchPieces, Piece, Report, Source
from siglip_train.data.config import DataConfig
from siglip_train.data.epochs import epochs, outlook
from siglip_train.data.read_ahead import ReadAhead
from siglip_train.data.remote.events import Event
from siglip_train.data.remote.locations import lasting_name, short_name, unsigned
from siglip_train.data.shards.faults import BadSampleLog, causes, too_many
from siglip_train.data.watchdog import Loss, Place, Quarantine, Verdict, unchanged, watched
from siglip_train.data.workers import worker_options
from siglip_train.distributed.collectives import gather_objects, sum_over_ranks
from siglip_train.distributed.cores import cores_of_rank
from siglip_train.errors import UserError

_LOG = logging.getLogger(__name__)


class Loader:
    """An endless iterator over this rank's `Batch`es.

    samples_seen: of the whole run, over all ranks, in the batches handed out. counts: of this rank, `seen`,
    `bad/<cause>`, `substituted`, `failed/<source>` (samples of unavailable shards), `fetch_retries`, `failed_shards`,
    `shards_back`, `changed_shards` (since they were counted), `workers_replaced` (all of them, so many times),
    `quarantined` (samples that ended their worker each time; where they would come, they are `bad/ends its worker`),
    `source/<name>`, `language/<name>`. unusable: `excluded/<cause>` for what the shards hold but cannot be used,
    `repeated_keys`, `shards_left_out`; the same on all ranks. fingerprint: changes with the
    samples or their order.
    """

    def __init__(
        self, pieces: BatchPieces, config: DataConfig, *, state: dict[str, Any] | None, pin_memory: bool
    ) -> None:
        self.config = config
        self.fingerprint = _fingerprint(pieces, config)
        self.samples_seen = 0
        self.counts: Counter[str] = Counter()
        self._pieces, self._pin_memory, self._log = pieces, pin_memory, BadSampleLog()
        self._quarantine = Quarantine()
        if state is not None:
            self._resume(state)
        self.unusable = self._found_unusable()

    @property
    def sources(self) -> list[Source]:
        """What it reads."""
        return self._pieces.sources

    def total_counts(self) -> dict[str, float]:
        """Counts over all ranks, and `passes/<source>` so far, from the position alone.  # all ranks"""
        done = epochs(self._pieces.sources, self._pieces.mixture, self.samples_seen)
        through = {f"passes/{name}": number for name, number in done.items()}
        return {**sum_over_ranks(self.counts), **self.unusable, **through}

    def outlook(self, total_samples: int) -> list[str]:
        """What a run of so many samples takes of its sources, and who reads them, in lines for the log."""
        lines = outlook(self._pieces.sources, self._pieces.mixture, total_samples)
        if self.config.workers == "auto":
            workers, cores = self.config.worker_count, cores_of_rank()
            lines.append(f"data.workers=auto: {workers} loader processes a rank, which has {cores} cores")
        return lines

    def state(self) -> dict[str, Any]:
        """What `build_loader` needs to go on after the last batch handed out.  # all ranks"""
        # what is unusable is found anew at the next start
        counts = sum_over_ranks(self.counts)
        # what is not there has no place in the order, so it must not come back with a resume
        left_out = sorted(lasting_name(url) for source in self.sources for url in source.shards.left_out)
        return {
            "samples_seen": self.samples_seen,
            "counts": counts,
            "fingerprint": self.fingerprint,
            "left_out": left_out,
            "quarantine": [
                list(found) for found in sorted(set().union(*gather_objects(self._quarantined())))
            ],
        }

    def _quarantined(self) -> set[tuple[str, str, int]]:
        """What is left out, in names that last: source, shard, number of the sample in it."""
        sources = self.sources
        return {
            (sources[at].name, lasting_name(sources[at].shards.urls[shard]), number)
            for at, shard, number in self._quarantine.places
        }

    def _leave_out(self, names: list[list[Any]]) -> None:
        """Leave out what the state of an earlier attempt names, where it is still there."""
        wanted = {(source, shard, number) for source, shard, number in names}
        shards = {(source, shard) for source, shard, _ in wanted}
        for at, source in enumerate(self.sources):
            for shard, url in enumerate(source.shards.urls):
                if (source.name, lasting_name(url)) in shards:
                    numbers = {
                        number for *place, number in wanted if place == [source.name, lasting_name(url)]
                    }
                    self._quarantine.add(Place(at, shard, number) for number in numbers)
        self._pieces.quarantined = self._quarantine.places

    def _resume(self, state: dict[str, Any]) -> None:
        size = self._pieces.share.global_batch_size
        self.samples_seen = state["samples_seen"]
        self._leave_out(state.get("quarantine", []))
        if self._pieces.share.rank == 0:
            # they are sums over the ranks there were, which may have been others
            self.counts.update({name: int(count) for name, count in state["counts"].items()})
        if self.samples_seen % size:
            raise UserError(
                f"cannot resume after {self.samples_seen} samples with global_batch_size {size}, which does not divide"
                " it; use the size of the interrupted run"
            )
        if state["fingerprint"] != self.fingerprint:
            _LOG.warning(
                "the shards, weights, seed or order differ from those of the checkpoint: the data do not go on where"
                " they stopped, but at the same position of another sequence"
            )

    def _found_unusable(self) -> Counter[str]:
        """Count and log what the shards hold but cannot give."""
        found: Counter[str] = Counter()
        for source in self._pieces.sources:
            shards = source.shards
            found.update(f"excluded/{bad.cause}" for bad in shards.excluded)
            found.update({"repeated_keys": shards.repeated, "shards_left_out": len(shards.left_out)})
            if self._pieces.share.rank == 0:
                self._log_unusable(source)
            excluded = len(shards.excluded)
            if too_many(excluded, excluded + len(shards), self.config.max_bad_share):
                raise UserError(
                    f"source {source.name}: {excluded} of {excluded + len(shards)} samples are incomplete"
                    f" ({causes(shards.excluded)}); check image and text of data.sources.{source.name}"
                    " or raise data.max_bad_share"
                )
        # a cause with no case is not worth a line
        return +found

    def _log_unusable(self, source: Source) -> None:
        for url, reason in source.shards.left_out.items():
            _LOG.warning(
                "source %s: this run goes without shard %s, also after a resume: %s",
                *(source.name, short_name(url), reason),
            )
        for bad in source.shards.excluded:
            self._log(bad)
        if source.shards.repeated:
            _LOG.warning(
                "source %s: %d samples have a key that came before in the same shard, as if the members of one sample"
                " were not adjacent",
                source.name,
                source.shards.repeated,
            )

    def __iter__(self) -> Iterator[Batch]:
        size = self._pieces.share.global_batch_size
        device = torch.cuda.current_device() if self._pin_memory else None
        stream = watched(
            self._from,
            self.samples_seen // size,
            lost=self._lost,
            stall_seconds=self.config.stall_seconds,
            gather=partial(_gathered, per_batch=self._pieces.per_batch, device=device),
        )
        with contextlib.closing(stream), self._read_ahead() as ahead:
            while True:
                if ahead is not None:
                    ahead.at(self.samples_seen)
                    self._report(ahead.events())
                batch = self._checked(next(stream))
                self.samples_seen += size
                yield batch

    def _read_ahead(self) -> contextlib.AbstractContextManager[ReadAhead | None]:
        """What makes the copies of shards before workers ask for them; None where no source needs copies."""
        if not any(source.shards.has_copies for source in self.sources):
            return contextlib.nullcontext()
        return ReadAhead(self.sources, self._pieces.mixture, in_flight(self._pieces, self.config))

    def _from(self, batch: int) -> DataLoader:
        return _data_loader(self._pieces, batch * self._pieces.per_batch, self.config)

    def _lost(self, loss: Loss) -> Verdict:
        self.counts["workers_replaced"] += 1
        where = self._pieces.where(loss.number)
        found = self._quarantine.ended(self._pieces.at_hand(loss.number, loss.dead))
        for place in found:
            self.counts["quarantined"] += 1
            _LOG.warning(
                "sample %s has ended its worker three times: it is left out from now on, also after a resume",
                self._pieces.name(place),
            )
        self._pieces.quarantined = self._quarantine.places
        return Verdict(where, is_mended=bool(found))

    def _report(self, events: list[Event]) -> None:
        for event in events:
            self.counts[event.name] += 1
            if event.message:
                _LOG.warning(event.message)

    def _checked(self, gathered: "_Gathered") -> Batch:
        batch, reports = gathered
        for report in reports:
            self.counts.update(report.counts)
            self._report(report.events)
        found = [bad for report in reports for bad in report.bad]
        for bad in found:
            self.counts[f"bad/{bad.cause}"] += 1
            self._log(bad)
        if batch is None:
            raise UserError(next(report.failure for report in reports if report.failure))
        self._quarantine.got_through()
        self.counts["seen"] += batch.size
        bad_samples = sum(count for name, count in self.counts.items() if name.startswith("bad/"))
        if found and too_many(bad_samples, self.counts["seen"], self.config.max_bad_share):
            raise UserError(
                f"{bad_samples} bad samples among {self.counts['seen']}, more than data.max_bad_share"
                f" {self.config.max_bad_share} allows; the last: {found[-1]}; the log names the others"
            )
        return batch


def in_flight(pieces: BatchPieces, config: DataConfig) -> int:
    """Samples of the run that workers may have begun beyond those handed out."""
    # one batch is gathered ahead
    batches = -(-config.worker_count * config.prefetch // pieces.per_batch) + 1
    return batches * pieces.share.global_batch_size if config.worker_count else 0


class _Gathered(NamedTuple):
    """The pieces of a batch in one; `batch` is None where one was given up."""

    batch: Batch | None
    reports: list[Report]


def _gathered(pieces: Iterator[Piece], *, per_batch: int, device: int | None) -> Iterator[_Gathered]:
    """Batches of this rank, of `per_batch` pieces each; in pinned memory for a CUDA `device`, where there is one.

    Every batch is a copy: a piece that is made later may take the memory of one of these.
    """
    if device is not None:
        # of this thread, which would else pin memory for the first
        torch.cuda.set_device(device)
    while True:
        parts = list(itertools.islice(pieces, per_batch))
        batches = [part.batch for part in parts if part.batch is not None]
        whole = join(batches, pin_memory=device is not None) if len(batches) == per_batch else None
        yield _Gathered(whole, [part.report for part in parts])


def _data_loader(pieces: BatchPieces, first: int, config: DataConfig) -> DataLoader:
    # those that workers may have begun, and the ones that a batch is being gathered of
    workers = config.worker_count
    in_use = workers * config.prefetch + pieces.per_batch
    return DataLoader(
        pieces.shared(in_use) if workers else pieces,
        batch_size=None,
        collate_fn=unchanged,
        sampler=itertools.count(first),  # type: ignore[arg-type]
        prefetch_factor=config.prefetch if workers else None,
        **worker_options(workers),
    )


def _fingerprint(pieces: BatchPieces, config: DataConfig) -> str:
    parts = [
        (
            source.name,
            [unsigned(url).rsplit("/", 1)[-1] for url in source.shards.urls],
            source.shards.counts.tolist(),
        )
        for source in pieces.sources
    ]
    choices = [(source.weight, source.select) for source in config.sources.values()]
    later = pieces.mixture.stages[1:]
    content = (parts, choices, pieces.mixture.seed, config.order, config.shuffle_window, *later)
    return f"{zlib.crc32(repr(content).encode()):08x}"
