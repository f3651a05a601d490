"""How often a run goes through each of its sources: so far, and in all, said before training begins."""

from collections.abc import Sequence
from typing import Protocol

from siglip_train.data.mixture import Mixture, Stage
from siglip_train.data.shards.reader import ShardSet


class Source(Protocol):
    """What of a source says how often it is seen."""

    name: str
    shards: ShardSet


def epochs(sources: Sequence[Source], mixture: Mixture, samples: int) -> dict[str, float]:
    """Epochs of each source in the first `samples` of the run; a pure function of the position."""
    taken = mixture.taken(samples)
    return {source.name: slots / len(source.shards) for source, slots in zip(sources, taken, strict=True)}


def outlook(sources: Sequence[Source], mixture: Mixture, total_samples: int) -> list[str]:
    """What a run of so many samples takes of its sources: a line for each source and each later stage."""
    total = -(-total_samples // mixture.global_batch_size) * mixture.global_batch_size
    lines = [
        f"source {source.name}: {len(source.shards):,} samples in {_shards(len(source.shards.urls))},"
        f" {_percent(slots, total)} of the mix, {_number(slots / len(source.shards))} epochs in this run"
        for source, slots in zip(sources, mixture.taken(total), strict=True)
    ]
    return lines + [_stage(sources, stage) for stage in mixture.stages[1:] if stage.from_sample < total]


def _stage(sources: Sequence[Source], stage: Stage) -> str:
    weights = zip(sources, stage.weights, strict=True)
    shares = [f"{source.name} {_percent(weight, sum(stage.weights))}" for source, weight in weights]
    return f"from sample {stage.from_sample:,} on: {', '.join(shares)}"


def _shards(number: int) -> str:
    return f"{number:,} shard{'' if number == 1 else 's'}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g} %"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
