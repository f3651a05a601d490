"""Samples that cannot be used: how they are logged, and when there are too many of them."""

import logging
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from siglip_train.errors import SampleError

_LOG = logging.getLogger(__name__)

# below so many samples the share of bad ones says nothing
_MIN_SAMPLES = 200
# of a message: it may show what a stranger has written, at any length
_MAX_DETAIL = 500
# bad samples of one cause: the first are all logged, then every hundredth
_LOGGED, _LOGGED_EVERY = 20, 100
# Pillow names the object in memory that it cannot read: another in every run
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")
# of a reason in a list of what was left out
_MAX_LISTED = 200


class BadSample(NamedTuple):
    """Where an unusable sample is, the cause it is counted under, and the details ("" = none)."""

    shard: str
    key: str
    cause: str
    detail: str = ""

    @classmethod
    def of(cls, shard: str, key: str, error: Exception) -> "BadSample":
        """The sample that failed with `error`; what no one foresaw is a "read error"."""
        if isinstance(error, SampleError):
            return cls(shard, key, error.cause, _ADDRESS.sub("", error.detail)[:_MAX_DETAIL])
        return cls(shard, key, "read error", f"{type(error).__name__}: {error}"[:_MAX_DETAIL])

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.cause}" + (f" ({self.detail})" if self.detail else "")


class BadSampleLog:
    """Logs bad samples: of each cause the first ones all, then every hundredth."""

    def __init__(self) -> None:
        self._logged: Counter[str] = Counter()

    def __call__(self, bad: BadSample) -> None:
        """Log one, or not."""
        self._logged[bad.cause] += 1
        count = self._logged[bad.cause]
        if count <= _LOGGED or count % _LOGGED_EVERY == 0:
            _LOG.warning("bad sample %s", bad)
        if count == _LOGGED:
            _LOG.warning("of those, only every %dth is logged from now on", _LOGGED_EVERY)


def too_many(bad: int, seen: int, max_share: float) -> bool:
    """Is the share of bad samples really above `max_share`?

    Two standard deviations of chance are granted, and nothing is concluded below 200 samples, so that one bad
    sample in a small run is no error. With `max_share` 0 every bad sample is one too many.
    """
    if max_share == 0:
        return bad > 0
    allowed = max_share * seen
    return seen >= _MIN_SAMPLES and bad > allowed + 2 * allowed**0.5


def causes(bad: Iterable[BadSample]) -> str:
    """`3 no text, 1 truncated`."""
    counts = Counter(each.cause for each in bad)
    return ", ".join(f"{count} {cause}" for cause, count in counts.most_common())


def plain_detail(detail: str) -> str:
    """What an error said, the same in every run and not too long to be listed."""
    return _ADDRESS.sub("", detail)[:_MAX_LISTED]
