"""The training loader: an endless, resumable stream of `Batch`, this rank's share of every global batch."""

import contextlib
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader

from siglip_train.batch import Batch, Images
from siglip_train.data.cache import ShardCache
from siglip_train.data.faults import BadSampleLog, causes, too_many
from siglip_train.data.fetch import Event
from siglip_train.data.images import MAX_PIXELS, ImageTransform
from siglip_train.data.limits import Limits
from siglip_train.data.locations import lasting_name, short_name, unsigned
from siglip_train.data.mixture import Mixture, StageConfig, stages_of
from siglip_train.data.order import Order, SourceOrder
from siglip_train.data.passes import outlook, passes
from siglip_train.data.patience import USUAL, Patience
from siglip_train.data.pieces import Piece, Pieces, Report, Share, Source
from siglip_train.data.quarantine import Place, Quarantine
from siglip_train.data.read_ahead import ReadAhead
from siglip_train.data.samples import CaptionChoice, Field
from siglip_train.data.select import EVERYTHING, Selection
from siglip_train.data.shards import ShardReader, ShardSet, Wanted
from siglip_train.data.survey import Progress, check_room, survey
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.data.watchdog import STALL_SECONDS, Loss, Verdict, watched
from siglip_train.data.workers import Workers, unchanged, worker_count, worker_options
from siglip_train.distributed.collectives import gather_objects, sum_over_ranks
from siglip_train.distributed.cores import cores_of_rank
from siglip_train.errors import UserError

_LOG = logging.getLogger(__name__)


@dataclass
class SourceConfig:
    """One set of shards.

    shards: path, folder, brace list, glob, URL, `pipe:` command, several joined by `::`, or a list of these.
    weight: share of the mixture, relative to the other sources; 0 = not before a stage gives it some. image: member
    extensions in order of preference. text: member (`txt`), field (`json:names.de`, `json:captions.*` = any of them),
    or a mapping of such to probabilities, or null where an objective needs no captions. label: member (`cls`) or field
    (`json:class`) with a class index, for such objectives. language: counted in the log, a name (`en`) or a field
    (`json:lang`).
    select: which samples, by key.
    """

    shards: Any
    weight: float = 1.0
    image: str = "jpg;jpeg;png;webp;bmp"
    text: Any = "txt"
    label: str | None = None
    language: str | None = None
    select: Selection = field(default_factory=Selection)


@dataclass
class DataConfig:
    """What to train on and how to read it.

    source_defaults: what every source has that does not say it itself, `{text: null, label: cls}`.
    stages: other weights from given sample counts on. order: shuffled or sequential passes through each source, or
    resampled: shards drawn with replacement, without passes, for sources too large to be seen once.
    workers: processes of a rank that read and decode, 0 = the training process itself; auto = the cores that a rank
    has, at most 12. The samples and their order do not depend on it.
    shuffle_window: samples are permuted within runs of permuted shards that hold at least so many.
    resize: filter by which images are brought to the model's size. flip: mirror every second image. min_crop_area:
    below 1, a random crop of at least this share of the area is taken in place of the whole image.
    reduced_jpeg: decode a JPEG much larger than needed at 1/2, 1/4 or 1/8; faster, the same but for fine detail.
    max_bad_share: of unusable samples, before training and of those read, from 200 samples on; 0 = none at all.
    max_image_pixels: larger pictures count as bad, before they take memory: 50 million pixels take 150 MB, those of
    a PNG with transparency 800 (assumption). max_member_mib: so do members of a tar. max_unpack_ratio, max_unpack_gib:
    a packed shard may unpack to so many times its size beyond 64 MiB, and to so much; one that would counts as bad if
    it is local, as unavailable if it is remote. cache_dir: for downloads, unpacked shards and shard indexes.
    prefetch: pieces of up to 256 samples that each worker holds ready, in shared memory.
    stall_seconds: workers that give nothing for so long, or die, are replaced; not watched with workers=0, where this
    process itself reads.
    cache_limit_gib: of copies of remote and packed shards on a machine, the least recently used go first; null = no
    bound. fetch_timeout_seconds: of silence. fetch_attempts: per shard. max_failed_shards: share of a source's shards
    that may be unavailable at once (one, if it has several and the share is above 0), or not be counted at the start.
    embedding_dir: a folder that all ranks see: what a locked image tower makes of every picture is computed once, kept
    there, and read in place of the pictures; null = no.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    stages: list[StageConfig] = field(default_factory=list)
    source_defaults: dict[str, Any] = field(default_factory=dict)
    workers: Workers = "auto"
    shuffle_window: int = 16384
    order: Order = "shuffled"
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    flip: bool = False
    min_crop_area: float = 1.0
    reduced_jpeg: bool = True
    max_bad_share: float = 0.01
    max_image_pixels: int = MAX_PIXELS
    max_member_mib: float = Limits.member_mib
    max_unpack_ratio: float = Limits.unpack_ratio
    max_unpack_gib: float = Limits.unpack_gib
    cache_dir: str | None = None
    prefetch: int = 4
    stall_seconds: float = STALL_SECONDS
    cache_limit_gib: float | None = None
    fetch_timeout_seconds: float = USUAL.timeout_seconds
    fetch_attempts: int = USUAL.attempts
    max_failed_shards: float = Source.max_failed_shards
    embedding_dir: str | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.worker_count < 0 or self.prefetch < 1 or not 0 <= self.max_bad_share <= 1:
            raise ValueError("workers must not be negative, prefetch at least 1 and max_bad_share in 0..1")
        if not self.stall_seconds > 0:
            raise ValueError(f"stall_seconds must be above 0, got {self.stall_seconds}")
        if self.fetch_attempts < 1 or not 0 <= self.max_failed_shards <= 1:
            raise ValueError("fetch_attempts must be at least 1 and max_failed_shards in 0..1")
        if min(self.fetch_timeout_seconds, 1 if self.cache_limit_gib is None else self.cache_limit_gib) <= 0:
            raise ValueError("fetch_timeout_seconds and cache_limit_gib must be above 0")
        if min(self.max_image_pixels, self.max_member_mib, self.max_unpack_ratio, self.max_unpack_gib) <= 0:
            raise ValueError(
                "max_image_pixels, max_member_mib, max_unpack_ratio and max_unpack_gib must be above 0"
            )
        if self.embedding_dir is not None and (self.flip or self.min_crop_area < 1):
            raise ValueError(
                "embedding_dir keeps what the tower makes of whole pictures, so they cannot be cropped or mirrored: set"
                " data.flip=false data.min_crop_area=1.0, or data.embedding_dir=null"
            )

    @property
    def worker_count(self) -> int:
        """Loader processes of this rank."""
        return worker_count(self.workers)


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
        self, pieces: Pieces, config: DataConfig, *, state: dict[str, Any] | None, pin_memory: bool
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
        done = passes(self._pieces.sources, self._pieces.mixture, self.samples_seen)
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
        with (
            contextlib.closing(stream),
            ReadAhead(self._pieces, _in_flight(self._pieces, self.config)) as ahead,
        ):
            while True:
                ahead.at(self.samples_seen)
                self._report(ahead.events())
                batch = self._checked(next(stream))
                self.samples_seen += size
                yield batch

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


def _in_flight(pieces: Pieces, config: DataConfig) -> int:
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
        whole = _joined(batches, pin_memory=device is not None) if len(batches) == per_batch else None
        yield _Gathered(whole, [part.report for part in parts])


def _joined(parts: list[Batch], *, pin_memory: bool) -> Batch:
    def cat(tensors: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> torch.Tensor:
        shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
        out = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pin_memory)
        return torch.cat(tensors, out=out)

    # of training data without a mask
    images = [part.images[:2] for part in parts if part.images is not None]
    keys = tuple(key for part in parts for key in part.keys)
    labels = [part.labels for part in parts if part.labels is not None]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Batch(
        Images(*map(cat, zip(*images, strict=True))) if images else None,
        cat([part.texts for part in parts]),
        keys,
        cat(labels) if labels else None,
        cat(pooled) if pooled else None,
    )


def _data_loader(pieces: Pieces, first: int, config: DataConfig) -> DataLoader:
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


def _fingerprint(pieces: Pieces, config: DataConfig) -> str:
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


def build_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None,
    transform: ImageTransform,
    share: Share,
    seed: int,
    state: dict[str, Any] | None = None,
    pin_memory: bool = False,
    progress: Progress | None = None,
) -> Loader:
    """Find and count the shards, check them, and make the loader.  # all ranks

    state: of an interrupted run's loader, on any number of ranks and workers. progress: called with (shards done,
    shards in all) while counting. Raises `UserError` for what would stop training: shards that are missing or
    unreadable, too few samples, too many incomplete ones.
    """
    if not config.sources:
        raise UserError("data.sources is empty; give data.sources.NAME.shards=...")
    names, sources = list(config.sources), list(config.sources.values())
    stages = stages_of({name: source.weight for name, source in config.sources.items()}, config.stages)
    mixture = Mixture(stages, share.global_batch_size, seed)
    _check_alike(config)
    if tokenizer is None and any(source.text is not None for source in sources):
        raise UserError(
            "captions need a tokenizer: tokenizer=PATH to a .model, a tokenizer.json or a folder with one"
        )
    choices = [None if source.text is None else CaptionChoice(source.text) for source in sources]
    labels = [None if source.label is None else Field.parse(source.label) for source in sources]
    languages = [_language(source) for source in sources]
    wanted = [wanted_of(source) for source in sources]
    cache = cache_of(config)
    shard_sets = survey(
        [source.shards for source in sources],
        wanted,
        cache,
        progress,
        left_out=state.get("left_out", ()) if state else (),
        # to lose one more shard on the way would change the order
        may_leave_out=state is None and config.max_failed_shards > 0,
    )
    ready = [
        Source(
            name=name,
            shards=shards,
            order=SourceOrder(
                shards.counts, seed=seed, source=number, window=config.shuffle_window, order=config.order
            ),
            captions=choice,
            label=label,
            language=language,
            language_name=None if language else source.language,
            reader=ShardReader(shards),
            max_failed_shards=config.max_failed_shards,
        )
        for number, (name, source, shards, choice, label, language) in enumerate(
            zip(names, sources, shard_sets, choices, labels, languages, strict=True)
        )
    ]
    for source in ready:
        source.check_left_out()
    _check_sizes(names, shard_sets, mixture)
    pieces = Pieces(ready, mixture, share, tokenizer, transform, config.max_image_pixels)
    check_room(shard_sets, cache, config.shuffle_window, _in_flight(pieces, config))
    return Loader(pieces, config, state=state, pin_memory=pin_memory)


def wanted_of(source: SourceConfig) -> Wanted:
    """The members that samples of a source need, and those that are read where they are there."""
    choice = None if source.text is None else CaptionChoice(source.text)
    label = None if source.label is None else Field.parse(source.label)
    others = tuple(field.member for field in (label, _language(source)) if field)
    return Wanted(extensions(source.image), choice.members if choice else None, others, source.select)


def cache_of(config: DataConfig) -> ShardCache:
    """The cache that the config names."""
    return ShardCache.at(
        config.cache_dir,
        config.cache_limit_gib,
        Patience(config.fetch_timeout_seconds, config.fetch_attempts),
        Limits(config.max_unpack_ratio, config.max_unpack_gib, config.max_member_mib),
    )


def extensions(image: str) -> tuple[str, ...]:
    """`jpg;png` to its extensions. Raises `UserError` where there is none."""
    found = tuple(part.strip().lower().lstrip(".") for part in image.split(";") if part.strip())
    if not found:
        raise UserError(f'image is {image!r}, but must name member extensions, such as "jpg;png"')
    return found


def _language(source: SourceConfig) -> Field | None:
    is_field = source.language is not None and source.language.startswith("json:")
    return Field.parse(source.language or "") if is_field else None


def _check_alike(config: DataConfig) -> None:
    """A batch has captions for all of its samples or for none, and so with labels."""
    for key in ("text", "label"):
        without = [name for name, source in config.sources.items() if getattr(source, key) is None]
        if 0 < len(without) < len(config.sources):
            raise UserError(
                f"data.sources.{without[0]}.{key} is null, and other sources have one: batches mix all sources, so"
                " give it for each of them or for none"
            )


def _no_sample(name: str, shards: ShardSet) -> str:
    """What a source without a complete sample holds, and what it was to hold."""
    wanted = shards.wanted
    why = causes(shards.excluded) or (
        "they are empty" if wanted.select == EVERYTHING else "select leaves none"
    )
    first = next((f"; the first, {bad.shard}/{bad.key}: {bad.detail}" for bad in shards.excluded if bad.detail),
                 f"; first shard: {shards.urls[0]}")  # fmt: skip
    text = f", and as text (.text) {' or '.join(wanted.text)}" if wanted.text else ""
    return (
        f"source {name}: none of its {len(shards.urls)} shards holds a sample with image and text ({why}){first}; asked"
        f" for are as image (data.sources.{name}.image) {', '.join(wanted.image)}{text}"
    )


def _check_sizes(names: list[str], shard_sets: list[ShardSet], mixture: Mixture) -> None:
    for name, shards, quota in zip(names, shard_sets, mixture.per_batch(), strict=True):
        if len(shards) == 0:
            raise UserError(_no_sample(name, shards))
        if len(shards) < quota:
            raise UserError(
                f"source {name} has {len(shards)} complete samples, fewer than the {quota} of one global batch;"
                " lower global_batch_size or its weight, or add shards"
            )
