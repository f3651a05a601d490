"""Counts samples and labels before a run is planned, as only the samples themselves say how many there are."""

import logging
from collections import Counter
from dataclasses import replace

import torch.distributed as dist

from siglip_train.data.config import DataConfig, SourceConfig, cache_of, wanted_of
from siglip_train.data.remote.locations import is_remote, short_name
from siglip_train.data.shards.faults import causes
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.index_shards import index_shards
from siglip_train.data.shards.labels import class_label
from siglip_train.data.shards.reader import ShardReader, ShardSet
from siglip_train.data.shards.select import Selection
from siglip_train.distributed.collectives import gather_objects, is_distributed
from siglip_train.errors import SampleError, UserError

_LOG = logging.getLogger(__name__)

_MAKE_CAPTIONS = "; folders of classes give no captions, siglip-data pack --caption-template makes some"


def count_samples(config: DataConfig) -> dict[str, int]:
    """The complete samples that are selected of each source, by its name.  # all ranks

    Raises `UserError` for a source that has none.
    """
    sets = _indexed(config, list(config.sources.values()))
    for (name, source), shards in zip(config.sources.items(), sets, strict=True):
        if not len(shards):
            lacking = f" ({causes(shards.excluded)})" if shards.excluded else ""
            raise UserError(
                f"data.sources.{name}: no sample of it can be trained on{lacking}; check its image, text and select"
                + _MAKE_CAPTIONS * (source.folder is not None)
            )
    return dict(zip(config.sources, map(len, sets), strict=True))


def count_labels(config: DataConfig) -> Counter[int]:
    """How many samples have which label in all sources together, held out or not.  # all ranks

    Every rank reads the labels of a part of the shards, without their images. Raises `UserError` on all ranks alike for
    a label that is no number from 0 on, and where shards would have to be fetched only to be counted.
    """
    whole = [
        replace(source, text=None, language=None, select=Selection(keys=source.select.keys))
        for source in config.sources.values()
    ]
    for name, source in config.sources.items():
        if source.label is None:
            raise UserError(
                f"data.sources.{name}.label: classification needs one, the member (cls) or field (json:class) with the"
                " class index"
            )
    sets = _indexed(config, whole)
    _refuse_remote(sets)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    counts: Counter[int] = Counter()
    failure = None
    try:
        for shards, source in zip(sets, whole, strict=True):
            for shard in range(rank, len(shards.urls), ranks):
                counts += _labels_of(shards, shard, Field.parse(str(source.label)))
    except UserError as error:
        # the others would wait for ever if it were raised here
        failure = str(error)
    parts = gather_objects((counts, failure))
    for _, failure in parts:
        if failure is not None:
            raise UserError(failure)
    return sum((found for found, _ in parts), Counter())


def _indexed(config: DataConfig, sources: list[SourceConfig]) -> list[ShardSet]:
    return index_shards(
        [source.shards for source in sources],
        [wanted_of(source) for source in sources],
        cache_of(config),
        may_leave_out=config.max_failed_shards > 0,
    )


def _refuse_remote(sets: list[ShardSet]) -> None:
    remote = [url for shards in sets for url in shards.urls if is_remote(url)]
    if remote:
        raise UserError(
            f"objectives: {len(remote)} remote shards, such as {short_name(remote[0])}, would all be fetched to count"
            " classes; give objectives.NAME.classes=NUMBER, or objectives.NAME.classnames=FILE with a name a line"
        )


def _labels_of(shards: ShardSet, shard: int, label: Field) -> Counter[int]:
    """The labels of a shard; a sample without one is bad, and left to the loader, which counts those."""
    reader, counts = ShardReader(shards), Counter[int]()
    for sample in range(int(shards.counts[shard])):
        raw = reader.read(shard, sample, image=False)
        try:
            number = class_label(label, raw)
        except SampleError as error:
            if label.first(raw) is None:
                continue
            raise UserError(
                f"sample {raw.name}: {error.detail}; labels are numbers from 0 on, and names of classes stand in a file"
                " (objectives.NAME.classnames=FILE), a line each in their order"
            ) from None
        if number < 0:
            raise UserError(f"sample {raw.name}: {label.text} is {number}, and labels begin with 0")
        counts[number] += 1
    return counts
