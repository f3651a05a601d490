"""Skips samples that end their worker each time, by a fault in a decoder or by their size, like bad ones."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# workers that a sample may end before it is left out: one may have been killed for what others took of memory
_WORKERS = 3
# samples left out in a row without a batch in between: then it is not the samples
_IN_A_ROW = 3
CAUSE = "ends its worker"


class Place(NamedTuple):
    """A sample: numbers of its source, of the shard in that, and of the sample in the shard."""

    source: int
    shard: int
    number: int


class Quarantine:
    """Which samples are left out; found on this rank, or told by a checkpoint of all."""

    def __init__(self) -> None:
        self.places: frozenset[Place] = frozenset()
        self._ended: Counter[Place] = Counter()
        self._in_a_row = 0

    def add(self, places: Iterable[Place]) -> None:
        """Leave these out."""
        self.places |= frozenset(places)

    def ended(self, places: Iterable[Place]) -> list[Place]:
        """Workers have been lost at these samples; returns those that are left out from now on."""
        self._ended.update(places)
        found = [place for place in places if self._ended[place] >= _WORKERS and place not in self.places]
        if not found or self._in_a_row >= _IN_A_ROW:
            return []
        self._in_a_row += 1
        self.add(found)
        return found

    def got_through(self) -> None:
        """A batch was made."""
        self._in_a_row = 0
