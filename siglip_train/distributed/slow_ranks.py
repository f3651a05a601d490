"""Names the rank that the others wait for: the mean over ranks hides it, and it costs all of them its time."""

import logging
from collections.abc import Sequence
from statistics import mean, median_low
from typing import NamedTuple

log = logging.getLogger(__name__)


class Times(NamedTuple):
    """Seconds a step of one rank: waiting for data, for the exchange with others, and all the rest (compute)."""

    host: str
    step: float
    data: float
    exchange: float

    @property
    def compute(self) -> float:
        """What is neither waiting for data nor for others."""
        return self.step - self.data - self.exchange


def largest(ranks: Sequence[Times]) -> dict[str, float]:
    """`data_time_max` and `data_time_max_rank`, and the same of compute and exchange; nothing of a single rank."""
    found: dict[str, float] = {}
    for name in ("data", "compute", "exchange") if len(ranks) > 1 else ():
        times = [getattr(times, name) for times in ranks]
        found[f"{name}_time_max"] = max(times)
        found[f"{name}_time_max_rank"] = float(times.index(max(times)))
    return found


class SlowRank:
    """Warns, once each time, of a rank that lags behind the median in data or compute at several logs in a row.

    excess: share of a step that it takes longer than the median rank. A long exchange is no lag: that rank is waiting.
    """

    def __init__(self, excess: float, logs: int) -> None:
        self._excess, self._logs = excess, logs
        self._last: tuple[str, int] | None = None
        self._in_a_row = 0

    def seen(self, ranks: Sequence[Times]) -> None:
        """Take the times of all ranks since the last log."""
        name, rank, lag = max(
            (
                (name, rank, getattr(times, name) - median_low(getattr(each, name) for each in ranks))
                for name in ("data", "compute")
                for rank, times in enumerate(ranks)
            ),
            key=lambda found: found[2],
        )
        if len(ranks) < 2 or lag <= self._excess * mean(times.step for times in ranks):
            self._last, self._in_a_row = None, 0
            return
        self._in_a_row = self._in_a_row + 1 if (name, rank) == self._last else 1
        self._last = name, rank
        if self._in_a_row == self._logs:
            took = getattr(ranks[rank], name)
            log.warning(
                "rank %d on %s keeps all others waiting: its %s takes %.3g s a step, the median rank's %.3g s, at %d"
                " logs in a row",
                rank,
                ranks[rank].host,
                "wait for data" if name == "data" else "computation",
                took,
                took - lag,
                self._logs,
            )
