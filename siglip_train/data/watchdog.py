"""Items that a DataLoader's workers make, one ahead; workers that die or hang are replaced and make the one due again.

Possible because an item is a pure function of its number. Samples that end their worker each time, by a fault in a
decoder or by their size, are put in quarantine: they are skipped like bad ones.
"""

import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from siglip_train.errors import UserError

_LOG = logging.getLogger(__name__)

# seconds without anything new after which workers count as stuck, where the user does not say
# more than a server that says nothing holds a worker, over all attempts
STALL_SECONDS = 600.0
# in a row, without an item in between
_REPLACEMENTS = 3
# how often to look whether the workers are still there
_POLL_SECONDS = 0.5
# for a worker to finish the item it is at, when all are told to leave
_LEAVE_SECONDS = 10.0
# workers that a sample may end before it is left out: one may have been killed for what others took of memory
_WORKERS_ENDED = 3
# samples left out in a row without a batch in between: then it is not the samples
_LEFT_OUT_IN_A_ROW = 3
CAUSE = "ends its worker"


class WorkersLostError(Exception):
    """The workers will give nothing more; the message says why. dead: those that ended by themselves."""

    def __init__(self, why: str, dead: frozenset[int] = frozenset()) -> None:
        super().__init__(why)
        self.dead = dead


class Loss(NamedTuple):
    """Workers are lost while the item `number` is due. dead: processes that ended; empty where nothing came."""

    number: int
    dead: frozenset[int]


class Verdict(NamedTuple):
    """where: what the lost workers were at. is_mended: that will be left out, so that the count begins anew."""

    where: str
    is_mended: bool = False


Gather = Callable[[Iterator[Any]], Iterator[Any]]


def _as_they_come(made: Iterator[Any]) -> Iterator[Any]:
    return made


class _Crew:
    """The workers of one iterator over a DataLoader, and the thread that gathers items of what they make, one ahead.

    A thread, because to take what a worker made is to ask it for the memory that lies in: for ever, where it is stuck.
    """

    def __init__(self, loader: DataLoader, gather: Gather) -> None:
        before = set(multiprocessing.active_children())
        iterator = gather(iter(loader))
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_take, args=(iterator, self._asked, self._given), name="data", daemon=True
        )
        self._thread.start()
        self._asked.put("next")

    def next(self, stall_seconds: float) -> Any:
        """The next item. Raises `WorkersLostError`, or whatever making it raised in a worker."""
        deadline = time.monotonic() + stall_seconds
        while True:
            try:
                item, error = self._given.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                self._check(seconds=0)
                if time.monotonic() > deadline:
                    raise WorkersLostError(f"nothing came for {stall_seconds:g} seconds") from None
                continue
            if error is not None:
                # of a dead worker the connection may be gone a moment earlier than the news
                self._check(seconds=_POLL_SECONDS)
                raise error
            self._asked.put("next")
            return item

    def _check(self, *, seconds: float) -> None:
        if not wait([process.sentinel for process in self._processes], timeout=seconds):
            return
        dead = [process for process in self._processes if not process.is_alive()]
        raise WorkersLostError(
            ", ".join(map(_end, dead)), frozenset(process.pid for process in dead if process.pid)
        )

    def dismiss(self) -> None:
        """Let the workers finish and leave; those that do not are killed."""
        self._asked.put("leave")
        if self._processes:
            self._thread.join(_LEAVE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End all workers now, whatever they are doing: one may be deep in a decoder, and deaf to signals."""
        self._asked.put("leave")
        for process in self._processes:
            process.kill()
        self._processes = []


def _take(iterator: Iterator[Any], asked: queue.SimpleQueue, given: queue.SimpleQueue) -> None:
    # this thread holds the last reference to the iterator, so that its clean-up happens here and delays no one
    while asked.get() == "next":
        try:
            given.put((next(iterator), None))
        except Exception as error:
            given.put((None, error))
            return


def _end(process: Any) -> str:
    code = process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"left with status {code}"
    return f"worker {process.pid} {how}"


def unchanged(item: Any) -> Any:
    """A DataLoader's `collate_fn`: collate nothing, as an item is a batch already."""
    return item


def watched(
    make: Callable[[int], DataLoader],
    first: int = 0,
    stop: int | None = None,
    *,
    lost: Callable[[Loss], Verdict],
    stall_seconds: float = STALL_SECONDS,
    gather: Gather = _as_they_come,
) -> Generator[Any, None, None]:
    """Items first..stop-1 (None: without end), gathered from the DataLoader that `make(number)` begins with it.

    Workers that die, or give nothing for `stall_seconds`, are replaced: all of them, as their queues may be damaged.
    gather: makes items of what the DataLoader gives, in a thread where it has workers.
    lost: called at each loss, before others begin. Raises `UserError` where the third replacement does not get through
    an item either. Without workers nothing is watched.
    """
    loader = make(first)
    if loader.num_workers == 0:
        yield from gather(iter(loader))
        return
    crew = _Crew(loader, gather)
    losses = 0
    try:
        number = first
        while number != stop:
            try:
                item = crew.next(stall_seconds)
            except WorkersLostError as error:
                crew.kill()
                verdict = lost(Loss(number, error.dead))
                losses = 0 if verdict.is_mended else losses + 1
                _report(losses, verdict.where, str(error))
                crew = _Crew(make(number), gather)
                continue
            losses = 0
            number += 1
            yield item
            # it may be large, and the next one takes a while
            del item
    finally:
        crew.dismiss()


def _report(losses: int, where: str, why: str) -> None:
    if losses > _REPLACEMENTS:
        raise UserError(
            f"the loader's workers were replaced {_REPLACEMENTS} times and do not get through {where} ({why});"
            " leave it out, or give workers more memory or, in training, more time by data.stall_seconds"
        )
    _LOG.warning("the loader's workers are replaced, the next begin with %s: %s", where, why)


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
        found = [
            place for place in places if self._ended[place] >= _WORKERS_ENDED and place not in self.places
        ]
        if not found or self._in_a_row >= _LEFT_OUT_IN_A_ROW:
            return []
        self._in_a_row += 1
        self.add(found)
        return found

    def got_through(self) -> None:
        """A batch was made."""
        self._in_a_row = 0
