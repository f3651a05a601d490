"""From the config of the data to a loader: shards are found, counted and checked, and the order of samples is made."""

from typing import Any

from siglip_train.data.batch_pieces import BatchPieces, RankShare, Source
from siglip_train.data.config import DataConfig, SourceConfig, cache_of, language_field, wanted_of
from siglip_train.data.inputs.base import Input, InputSetup, RunInputs
from siglip_train.data.inputs.captions import CaptionInput, TextPresenceInput
from siglip_train.data.loader import Loader, in_flight
from siglip_train.data.mixture import Mixture, stages_of
from siglip_train.data.order import SourceOrder
from siglip_train.data.shards.faults import causes
from siglip_train.data.shards.index_shards import Progress, check_room, index_shards
from siglip_train.data.shards.reader import ShardReader, ShardSet
from siglip_train.data.shards.select import EVERYTHING
from siglip_train.errors import UserError


def build_loader(
    config: DataConfig,
    *,
    inputs: RunInputs,
    share: RankShare,
    seed: int,
    state: dict[str, Any] | None = None,
    pin_memory: bool = False,
    progress: Progress | None = None,
) -> Loader:
    """Find and count the shards, check them, and make the loader.  # all ranks

    inputs: what batches hold. state: of an interrupted run's loader, on any number of ranks and workers. progress:
    called with (shards done, shards in all) while counting. Raises `UserError` for what would stop training: sources
    that do not say where an input is, shards that are missing or unreadable, too few samples, too many incomplete ones.
    """
    if not config.sources:
        raise UserError("data.sources is empty; give data.sources.NAME.shards=...")
    names, sources = list(config.sources), list(config.sources.values())
    stages = stages_of({name: source.weight for name, source in config.sources.items()}, config.stages)
    mixture = Mixture(stages, share.global_batch_size, seed)
    inputs = inputs._replace(kinds=_needed(inputs.kinds, sources))
    members = [
        _members(inputs.kinds, name, source, beside_texts=any(each.text is not None for each in sources))
        for name, source in config.sources.items()
    ]
    cache = cache_of(config)
    shard_sets = index_shards(
        [source.shards for source in sources],
        [wanted_of(source, sorted(more)) for source, more in zip(sources, members, strict=True)],
        cache,
        progress,
        left_out=state.get("left_out", ()) if state else (),
        # to lose one more shard on the way would change the order
        may_leave_out=state is None and config.max_failed_shards > 0,
    )
    ready = []
    for number, (name, source, shards) in enumerate(zip(names, sources, shard_sets, strict=True)):
        reader, language = ShardReader(shards), language_field(source)
        setup = InputSetup(name, source, reader, inputs, config)
        ready.append(
            Source(
                name=name,
                shards=shards,
                order=SourceOrder(
                    shards.counts, seed=seed, source=number, window=config.shuffle_window, order=config.order
                ),
                inputs=[kind(setup) for kind in inputs.kinds],
                reads_image="image" in members[number],
                language=language,
                language_name=None if language else source.language,
                reader=reader,
                max_failed_shards=config.max_failed_shards,
            )
        )
    for each in ready:
        each.check_left_out()
    _check_sizes(names, shard_sets, mixture)
    pieces = BatchPieces(ready, mixture, share)
    check_room(shard_sets, cache, config.shuffle_window, in_flight(pieces, config))
    return Loader(pieces, config, state=state, pin_memory=pin_memory)


def _needed(kinds: tuple[type[Input], ...], sources: list[SourceConfig]) -> tuple[type[Input], ...]:
    """Those that batches hold: which samples have texts is told where some source has none."""
    if any(source.text is None for source in sources):
        return kinds
    return tuple(kind for kind in kinds if kind is not TextPresenceInput)


def _members(
    kinds: tuple[type[Input], ...], name: str, source: SourceConfig, *, beside_texts: bool
) -> set[str]:
    """What is read of a source: of one without texts beside others that have some, what it has."""
    # an objective that does not ask which texts are there would take an empty one for a caption
    may_lack = beside_texts and (TextPresenceInput in kinds or CaptionInput not in kinds)
    read = [kind for kind in kinds if not (may_lack and kind.is_absent(source))]
    return {member for kind in read for member in kind.members(name, source)}


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
