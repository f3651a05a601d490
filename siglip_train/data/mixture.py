"""Which source a position of the run belongs to: exact shares by weight, which may change at given sample counts."""

import bisect
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from siglip_train.data.config import StageConfig
from siglip_train.data.order import LABELS, Ints, generator
from siglip_train.errors import UserError


class Stage(NamedTuple):
    """Weights of all sources, from a sample count on."""

    from_sample: int
    weights: list[float]


def stages_of(weights: Mapping[str, float], later: Sequence[StageConfig]) -> list[Stage]:
    """The stages of a run whose sources begin with these weights. Raises `UserError`."""
    names = list(weights)
    _check_weights("data.sources.*.weight", weights)
    stages = [Stage(0, list(weights.values()))]
    for number, stage in enumerate(later):
        where = f"data.stages[{number}]"
        unknown = sorted(stage.weights.keys() - weights.keys())
        if unknown:
            raise UserError(f"{where}: there is no source {unknown[0]} (there are: {', '.join(names)})")
        _check_weights(f"{where}.weights", stage.weights)
        if stage.from_sample <= stages[-1].from_sample:
            raise UserError(
                f"{where}: from_sample is {stage.from_sample}, but must be above {stages[-1].from_sample},"
                " where the weights before it begin"
            )
        stages.append(Stage(stage.from_sample, [stage.weights.get(name, 0.0) for name in names]))
    for source, name in enumerate(names):
        if not any(stage.weights[source] for stage in stages):
            raise UserError(f"source {name} has no weight from beginning to end; remove it or give it one")
    return stages


def _check_weights(where: str, weights: Mapping[str, float]) -> None:
    values = weights.values()
    if not all(math.isfinite(weight) and weight >= 0 for weight in values) or not any(values):
        raise UserError(
            f"{where}: the weights are {dict(weights)}, but must be finite, none below 0, not all 0"
        )


class _Section:
    """The positions of one stage, from `begin` on, cut into blocks; `length` is None for the last, which is endless.

    taken: slots of each source that earlier stages have used.
    """

    def __init__(self, weights: list[float], global_batch_size: int, *, begin: int, length: int | None,
                 taken: list[int]) -> None:  # fmt: skip
        self.begin, self.length, self.taken = begin, length, taken
        # as written (0.1 is a tenth), so that quotas are exact integers however long the run is
        shares = [Fraction(str(weight)) for weight in weights]
        common = math.lcm(*(share.denominator for share in shares))
        self.parts = [int(share * common) for share in shares]
        self.total = sum(self.parts)
        # below one sample a block, the largest remainder could take back what it gave
        rarest = min(part for part in self.parts if part)
        self.block_size = math.ceil(Fraction(self.total, rarest * global_batch_size)) * global_batch_size

    def quotas(self, samples: int) -> list[int]:
        """Slots of each source used after the first `samples` positions of the stage, at the end of a block."""
        floors = [samples * part // self.total for part in self.parts]
        remainders = [samples * part % self.total for part in self.parts]
        by_remainder = sorted(range(len(floors)), key=lambda source: -remainders[source])
        for source in by_remainder[: samples - sum(floors)]:
            floors[source] += 1
        return [before + new for before, new in zip(self.taken, floors, strict=True)]

    def block_of(self, position: int) -> int:
        """Number of the block, in this stage, that holds a position."""
        block = (position - self.begin) // self.block_size
        # what is left of a stage after its last full block joins that one: no block is short, none reaches beyond
        return block if self.length is None else min(block, max(1, self.length // self.block_size) - 1)

    def bounds(self, block: int) -> tuple[int, int]:
        """First position of a block and the one after its last, counted from the beginning of the stage."""
        start, stop = block * self.block_size, (block + 1) * self.block_size
        if self.length is not None and self.length - stop < self.block_size:
            stop = self.length
        return start, stop


class _Block(NamedTuple):
    """Consecutive positions from `begin` on; `taken`: slots of each source used before them."""

    begin: int
    taken: list[int]
    sources: Ints
    slots: Ints


class Mixture:
    """Positions of the run to slots of several sources, in proportion to the weights of the stage.

    Per block of global batches every source gets its quota (largest remainder of the quota *cumulative* over the
    stage, so its count at the end of a block is always within one of weight x samples), in an order shuffled within
    the block. A block is one global batch, unless some source gets less than one sample of it. Sources go on where
    they were when a stage begins: their slots are used in order, none twice, none left out.
    """

    def __init__(self, stages: Sequence[Stage], global_batch_size: int, seed: int) -> None:
        self.stages, self.global_batch_size, self.seed = list(stages), global_batch_size, seed
        begins = [-(-stage.from_sample // global_batch_size) * global_batch_size for stage in stages]
        taken = [0] * len(stages[0].weights)
        self._sections: list[_Section] = []
        for stage, begin, end in zip(stages, begins, [*begins[1:], None], strict=True):
            if begin == end:
                raise UserError(
                    f"data.stages: the stage from sample {stage.from_sample} ends before its first global batch of"
                    f" {global_batch_size}; move from_sample of the next one"
                )
            length = None if end is None else end - begin
            section = _Section(stage.weights, global_batch_size, begin=begin, length=length, taken=taken)
            self._sections.append(section)
            taken = section.quotas(length or 0)
        self._begins = begins
        self._block = functools.lru_cache(4)(self._make_block)

    def __reduce__(self) -> tuple:
        # the cache does not travel to a worker
        return Mixture, (self.stages, self.global_batch_size, self.seed)

    def per_batch(self) -> list[int]:
        """Samples that a global batch takes of each source, in the stage that takes the most of it."""
        size = self.global_batch_size
        by_stage = [[-(-size * part // each.total) for part in each.parts] for each in self._sections]
        return [max(counts) for counts in zip(*by_stage, strict=True)]

    def taken(self, position: int) -> list[int]:
        """Slots of each source used by all positions before this one."""
        block = self._block_at(position)
        labels = block.sources[: position - block.begin]
        counts = np.bincount(labels, minlength=len(block.taken)).tolist()
        return [before + count for before, count in zip(block.taken, counts, strict=True)]

    def slots(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Source and source slot of the positions start..stop-1, which lie in one global batch."""
        block = self._block_at(start)
        window = slice(start - block.begin, stop - block.begin)
        return block.sources[window], block.slots[window]

    def _block_at(self, position: int) -> _Block:
        stage = bisect.bisect_right(self._begins, position) - 1
        return self._block(stage, self._sections[stage].block_of(position))

    def _make_block(self, stage: int, block: int) -> _Block:
        section = self._sections[stage]
        start, stop = section.bounds(block)
        before, after = section.quotas(start), section.quotas(stop)
        sources = np.repeat(np.arange(len(before)), np.subtract(after, before))
        # trailing zeros do not change a seed: without stages the order is what it was before there were any
        generator(self.seed, LABELS, block, stage).shuffle(sources)
        slots = np.empty_like(sources)
        for source, first in enumerate(before):
            mine = sources == source
            slots[mine] = np.arange(first, first + int(mine.sum()))
        return _Block(section.begin + start, before, sources, slots)
