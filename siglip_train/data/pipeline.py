"""From the config of the data to a loader: shards are found, counted and checked, and the order of samples is made."""

from typing import Any

from siglip_train.data.batch_pieces import BatchPieces, RankShare, Source
from siglip_train.data.config import DataConfig, cache_of, language_field, wanted_of
from siglip_train.data.inputs.captions import CaptionChoice
from siglip_train.data.inputs.images import ImageTransform
from siglip_train.data.loader import Loader, in_flight
from siglip_train.data.mixture import Mixture, stages_of
from siglip_train.data.order import SourceOrder
from siglip_train.data.shards.faults import causes
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.index_shards import Progress, check_room, index_shards
from siglip_train.data.shards.reader import ShardReader, ShardSet
from siglip_train.data.shards.select import EVERYTHING
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import UserError


def build_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None,
    transform: ImageTransform,
    share: RankShare,
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
    languages = [language_field(source) for source in sources]
    wanted = [wanted_of(source) for source in sources]
    cache = cache_of(config)
    shard_sets = index_shards(
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
    pieces = BatchPieces(ready, mixture, share, tokenizer, transform, config.max_image_pixels)
    check_room(shard_sets, cache, config.shuffle_window, in_flight(pieces, config))
    return Loader(pieces, config, state=state, pin_memory=pin_memory)


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
