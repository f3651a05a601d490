"""What happens to shards on their way: counted, and logged where there is something to say."""

from collections import deque
from typing import NamedTuple


class Event(NamedTuple):
    """Something about a shard to be counted under `name` and, unless it is "", to be logged."""

    name: str
    message: str = ""


class Events(deque[Event]):
    """Events that wait to be reported; threads may add to them."""

    def drain(self) -> list[Event]:
        """Those since the last call."""
        return [self.popleft() for _ in range(len(self))]
