"""Tells all ranks, besides collectives, where each rank stands, and that one has failed or is missing.

A thread of each rank tells the store of the process group, every two seconds, where its main thread stands. So a rank
that fails can give all others its reason, where they would wait for it or meet a broken connection; and when no rank
moves any more, the one that all wait for is named.
"""

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from siglip_train.distributed.standing import PHASES, Standing, described

log = logging.getLogger(__name__)

_QUICK = ("data", "step", "metrics")

# seconds between two words to the store
_EVERY = 2.0
# without a word for so long a rank is gone or stopped: a thread may starve for some seconds on a busy machine
_SILENT = 10.0
# for the others to learn why, before the process goes that may hold the store
_LINGER = 6.0
# for a main thread to end by itself once another rank has failed, and for its clean-up
_LEAVE_ALONE, _CLEAN_UP = 3.0, 15.0
# for a thread of ours to come back from the store at the end
_CLOSE = 8.0

_OF_COMMUNICATION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|remote (peer|process)|TCPStore",
    re.IGNORECASE,
)


class Failure(NamedTuple):
    """Why all ranks end, and the exit status they end with. hangs: no rank moved any more."""

    reason: str
    status: int
    hangs: bool = False


class Peers:
    """The others of a run, and the thread that watches them for this rank.

    store: of all ranks; it is cloned, so that a rank that waits in it does not stop this thread. timeouts: seconds that
    a phase may last on all ranks without one moving: a step, and anything else. leave: ends this process from another
    thread. Where the store does not answer the run goes on without it, and this rank judges by itself.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        standing: Standing,
        timeouts: tuple[float, float],
        leave: Callable[[Failure], None],
    ) -> None:
        self._store, self._rank, self._world_size = store.clone(), rank, world_size
        self._standing, self._timeouts, self._leave = standing, timeouts, leave
        self._beats = 0
        self._known: Failure | None = None
        self._own: Failure | None = None
        self._told: Failure | None = None
        self._talked = time.monotonic()
        self._is_ending, self._is_closed = threading.Event(), threading.Event()
        self._heard: dict[int, tuple[Any, float]] = {}
        self._threads = [
            threading.Thread(target=self._watch, name="peers", daemon=True),
            # apart, because a store in a process that is stopped never answers
            threading.Thread(target=self._watch_alone, name="timeouts", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def tell(self, failure: Failure) -> None:
        """Give all others the reason of this rank, which leaves from another thread than the main one."""
        with contextlib.suppress(Exception):
            told = failure._replace(reason=f"rank {self._rank} on {socket.gethostname()}: {failure.reason}")
            self._told = told
            self._learn(self._post(told))
            self._linger()

    def close(self) -> None:
        """The run has ended, and this rank says nothing more."""
        self._is_closed.set()
        for thread in self._threads:
            # the interpreter aborts if it ends while a thread is inside the store
            thread.join(_CLOSE)

    def fail(self, error: BaseException, reason: str, status: int) -> Failure | None:
        """Tell all others that this rank ends with `error`, unless it only met the end of another: then it is told why.

        Returns that one's failure, or None where it is this rank's own.
        """
        own = self._own = Failure(f"rank {self._rank} on {socket.gethostname()}: {reason}", status)
        self._is_ending.set()
        is_met = _is_of_communication(error)
        try:
            told = self._post((is_met and self._await_failure()) or own)
            self._learn(told)
            self._linger()
        except Exception as lost:
            log.debug("the store of all ranks does not answer: %s", lost)
            gone = Failure(
                f"rank 0 or the launcher, which holds the store of all ranks, is gone ({reason})", 1
            )
            told = self._known or (gone if self._rank else own)
        if is_met and told.hangs:
            # another thread writes down where all stand, and ends this process
            self._is_closed.wait(_CLEAN_UP)
        return told if is_met and told != own else None

    def _watch(self) -> None:
        while not self._is_closed.wait(_EVERY if self._beats else 0):
            try:
                self._tell()
                failure = self._posted()
                if failure is None and self._is_overdue() and not self._is_ending.is_set():
                    failure = self._hang()
            except Exception as error:
                log.debug("the store of all ranks does not answer: %s", error)
                continue
            self._talked = time.monotonic()
            if failure is not None:
                # what this rank has told itself is the other thread's to end it with
                if failure != self._told:
                    self._follow(failure)
                return

    def _watch_alone(self) -> None:
        """End this rank where no other can tell it to: the store does not answer."""
        while not self._is_closed.wait(_EVERY):
            if time.monotonic() - self._talked < 3 * _SILENT:
                continue
            if self._is_ending.is_set():
                if not self._is_closed.wait(_SILENT + _CLEAN_UP) and self._own:
                    self._leave(self._own)
            elif self._is_overdue():
                seconds = time.monotonic() - self._standing.since
                reason = (
                    f"nothing has moved for {seconds:.0f} s at {self._standing}, and the store of all ranks"
                )
                self._leave(Failure(f"{reason}, in rank 0 or the launcher, does not answer", 1, hangs=True))

    def _tell(self) -> None:
        self._beats += 1
        told = {
            "beat": self._beats,
            "host": socket.gethostname(),
            **self._standing.report(),
            "exchanges": _exchanges(),
        }
        self._store.set(f"rank {self._rank}", json.dumps(told))

    def _posted(self) -> Failure | None:
        return Failure(*json.loads(self._store.get("failure"))) if self._store.check(["failure"]) else None

    def _post(self, failure: Failure) -> Failure:
        """Give all ranks this reason; the first one counts, and is returned."""
        return Failure(*json.loads(self._store.compare_set("failure", "", json.dumps(failure))))

    def _follow(self, failure: Failure) -> None:
        """End this rank as well, once the main thread has had the time to do so by itself."""
        with contextlib.suppress(Exception):
            self._learn(failure)
        if not failure.hangs and self._is_ending.wait(_LEAVE_ALONE) and self._is_closed.wait(_CLEAN_UP):
            return
        with contextlib.suppress(Exception):
            self._linger()
        self._leave(failure)

    def _learn(self, failure: Failure) -> None:
        """Say that this rank knows why all end."""
        if self._known is None:
            self._known = failure
            self._store.add("knowing", 1)

    def _linger(self) -> None:
        """Wait for the others to know: with this process the store may go."""
        deadline = time.monotonic() + _LINGER
        while self._store.add("knowing", 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.05)

    def _await_failure(self) -> Failure | None:
        """The failure of another rank, were it that it has fallen silent. None: no other has failed."""
        deadline = time.monotonic() + _SILENT + 2 * _EVERY
        self._listen()
        while time.monotonic() < deadline:
            if failure := self._posted():
                return failure
            self._tell()
            self._listen()
            if silent := self._silent():
                return Failure(f"{self._named(silent)} gone without a word, killed or out of memory", 1)
            time.sleep(0.5)
        return None

    def _limit(self, phase: str) -> float:
        quick, patient = self._timeouts
        return quick if phase in _QUICK else patient

    def _is_overdue(self) -> bool:
        # ranks judge one after another, each in case the one before is the one that hangs
        later = min(self._rank, 3) * 2 * _SILENT
        return time.monotonic() - self._standing.since > self._limit(self._standing.phase) + later

    def _hang(self) -> Failure | None:
        """Who keeps all ranks waiting; None where a rank still moves: then it is slow."""
        self._listen()
        deadline = time.monotonic() + _SILENT
        while time.monotonic() < deadline:
            if self._is_closed.wait(_EVERY) or not self._is_overdue():
                return None
            self._tell()
            self._listen()
            self._talked = time.monotonic()
            if failure := self._posted():
                return failure
        silent = self._silent()
        heard = {rank: told for rank, (told, _) in self._heard.items() if rank not in silent}
        if any(told["seconds"] < self._limit(told["phase"]) for told in heard.values()):
            return None
        seconds = time.monotonic() - self._standing.since
        if absent := [rank for rank in range(self._world_size) if rank not in self._heard]:
            reason = f"{_ranks(absent)} not come within {seconds:.0f} s, and {self._world_size} were to meet"
        else:
            reason = f"no rank has moved for {seconds:.0f} s: {self._missing(silent, heard)}"
        return self._post(Failure(reason, 1, hangs=True))

    def _missing(self, silent: list[int], heard: dict[int, Any]) -> str:
        if silent:
            return f"{self._named(silent)} silent, stopped or cut off{_others(heard)}"
        places = {
            rank: (told["step"], PHASES.index(told["phase"]), told["exchanges"])
            for rank, told in heard.items()
        }
        behind = [rank for rank in heard if places[rank] == min(places.values())]
        ahead = {rank: told for rank, told in heard.items() if rank not in behind}
        if not ahead:
            return f"all stand at {self._place(behind[0])}, so that the exchange itself hangs"
        return f"{self._named(behind)} missing{_others(ahead)}"

    def _named(self, ranks: list[int]) -> str:
        """`rank 3 on b, last heard of at step 7 (loop.py:204 divisors), is`."""
        first = ranks[0]
        more = "" if len(ranks) == 1 else f" and {_ranks(ranks[1:])}"
        verb = "is" if len(ranks) == 1 else "are"
        return f"rank {first} on {self._heard[first][0]['host']}, last heard of at {self._place(first)},{more} {verb}"

    def _place(self, rank: int) -> str:
        told = self._heard[rank][0]
        return f"{described(told['phase'], told['step'])} ({told['line']})"

    def _listen(self) -> None:
        """Read what every rank has told last, and note when it was new."""
        keys = [f"rank {rank}" for rank in range(self._world_size)]
        for rank, key in enumerate(keys):
            if not self._store.check([key]):
                continue
            told = json.loads(self._store.get(key))
            if rank not in self._heard or self._heard[rank][0]["beat"] != told["beat"]:
                self._heard[rank] = (told, time.monotonic())

    def _silent(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, when) in sorted(self._heard.items()) if now - when > 0.8 * _SILENT]


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {named} has" if len(ranks) == 1 else f"ranks {named} have"


def _others(waiting: dict[int, Any]) -> str:
    if not waiting:
        return ""
    rank = min(waiting)
    told = waiting[rank]
    whose = f"rank {rank} waits" if len(waiting) == 1 else f"{len(waiting)} ranks wait"
    return f"; {whose} at {described(told['phase'], told['step'])} ({told['line']})"


def _exchanges() -> int:
    """How many exchanges this rank has entered, of all groups; 0 where torch does not tell."""
    try:
        return sum(group._get_sequence_number_for_group() for group in process_groups())  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return 0


def process_groups() -> list[dist.ProcessGroup]:
    """All that there are, of libraries too; none where torch does not tell."""
    world = getattr(dist.distributed_c10d, "_world", None)
    return list(getattr(world, "pg_map", {}))


def _is_of_communication(error: BaseException) -> bool:
    """Whether the end of another rank can be what this one met."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError | OSError) and _OF_COMMUNICATION.search(str(error)) is not None
    )
