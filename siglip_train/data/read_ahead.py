"""Fetch the shards of the current and the next shuffle window before workers ask for them, a few at a time."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from siglip_train.data.mixture import Mixture
from siglip_train.data.order import SourceOrder
from siglip_train.data.remote.disk_budget import rounded
from siglip_train.data.remote.events import Event, Events
from siglip_train.data.shards.reader import ShardSet, open_shard

_THREADS = 4
# seconds between looks at what is missing or may be tried again
_PAUSE = 0.5
_TOUCH_EVERY = 1.0


class _Source(Protocol):
    shards: ShardSet
    order: SourceOrder


class _Task(NamedTuple):
    source: int
    shard: int


class ReadAhead:
    """A context in which daemon threads make the copies of shards that will be read soon.

    in_flight: samples of the run that workers may be ahead of those handed out. The threads never hold up the end of
    the context or of the process.
    """

    def __init__(self, sources: Sequence[_Source], mixture: Mixture, in_flight: int) -> None:
        self._sources, self._mixture, self._in_flight = sources, mixture, in_flight
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        # an own record of events, and the first to try a failed shard again
        self._cache = dataclasses.replace(
            self._sources[0].shards.cache, cancelled=self._stopped.is_set, events=Events(), tries_first=True
        )
        self._slots: dict[int, int] = {}
        self._wanted: list[_Task] = []
        self._busy: set[_Task] = set()
        self._made: dict[_Task, Path] = {}
        self._touched = 0.0

    def __enter__(self) -> "ReadAhead":
        for _ in range(_THREADS):
            threading.Thread(target=self._run, name="read-ahead", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    def at(self, position: int) -> None:
        """Tell that the run has come to `position`, the first of a global batch."""
        wanted = self._plan(position)
        if wanted != self._wanted:
            with self._changed:
                self._wanted = wanted
                self._changed.notify_all()
        if time.monotonic() - self._touched > _TOUCH_EVERY:
            self._touched = time.monotonic()
            for task in wanted:
                self._cache.room.touch(self._path(task))

    def events(self) -> list[Event]:
        """What there is to report since the last call."""
        return self._cache.events.drain()

    def _plan(self, position: int) -> list[_Task]:
        """The shards of all current windows, then those that follow, as many as the cache holds."""
        self._slots.update(self._first_slots(position))
        ends = self._first_slots(position + self._in_flight)
        current, following = [], []
        for number, slot in self._slots.items():
            order = self._sources[number].order
            stop = max(slot, ends.get(number, slot)) + order.window
            current += [_Task(number, shard) for shard in order.shards_between(slot, slot + 1)]
            following += [_Task(number, shard) for shard in order.shards_between(slot, stop)]
        left = float("inf") if self._cache.limit is None else self._cache.limit
        wanted = []
        for task in dict.fromkeys(current + following):
            shards = self._sources[task.source].shards
            if self._cache.is_copy(shards.paths[task.shard]):
                left -= rounded(int(shards.sizes[task.shard]))
                if left < 0:
                    break
                wanted.append(task)
        return wanted

    def _first_slots(self, position: int) -> dict[int, int]:
        """The first slot of each source in a global batch; some may have none in it."""
        sources, slots = self._mixture.slots(position, position + self._mixture.global_batch_size)
        found = {}
        for number in range(len(self._sources)):
            mine = sources == number
            if mine.any():
                found[number] = int(slots[mine.argmax()])
        return found

    def _run(self) -> None:
        while not self._stopped.is_set():
            task = self._take()
            if task is None:
                with self._changed:
                    self._changed.wait(_PAUSE)
                continue
            # what is wrong is noted in the cache, or said where a worker needs the shard
            with contextlib.suppress(Exception):
                shards = self._sources[task.source].shards
                self._made[task] = open_shard(shards, task.shard, self._cache).path
            self._busy.discard(task)

    def _take(self) -> _Task | None:
        """A shard that is missing and that no other thread is at."""
        with self._changed:
            for task in (*self._wanted, *self._failed()):
                if task not in self._busy and self._is_due(task):
                    self._busy.add(task)
                    return task
        return None

    def _path(self, task: _Task) -> Path:
        return self._made.get(task) or self._sources[task.source].shards.paths[task.shard]

    def _is_due(self, task: _Task) -> bool:
        url = self._sources[task.source].shards.urls[task.shard]
        return not self._cache.has(self._path(task)) and self._cache.may_try(url)

    def _failed(self) -> list[_Task]:
        """Shards that failed wherever they are in the order: they count as failed until they are back."""
        return [self._tasks[name] for name in self._cache.failed.all() if name in self._tasks]

    @functools.cached_property
    def _tasks(self) -> dict[str, _Task]:
        return {
            self._cache.name(url): _Task(number, shard)
            for number, source in enumerate(self._sources)
            for shard, url in enumerate(source.shards.urls)
        }
