"""Signals that ask a run to stop: it saves at the next step. Where none comes, it ends with word of where it stood."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from siglip_train.distributed.standing import Standing

# of Slurm, a preempting cloud, a launcher; of Slurm before its time limit; of a terminal that is lost
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# a launcher hands on what the whole job was sent: the same signal twice within seconds is one
_SAME = 5.0
# torchrun and clouds kill 30 s after their signal; where the run stands still, that is written down before
_WRITE_DOWN = 20.0
_POLL = 1.0


def _nothing(*_: object) -> None:
    pass


class StopSignal:
    """Remembers SIGTERM, SIGUSR1 and SIGHUP, to be asked at a safe point.

    Where the main thread does not come to a checkpoint within `grace_seconds`, or at a second signal, `leave` ends the
    process: called in a thread, as a main thread that waits for another rank cannot act on signals.
    write_stacks: called once before, when nothing has moved since the signal.
    """

    def __init__(
        self,
        standing: Standing | None = None,
        *,
        grace_seconds: float = float("inf"),
        leave: Callable[[str, int], None] = _nothing,
        write_stacks: Callable[[], None] = _nothing,
    ) -> None:
        self.received: str | None = None
        self._standing, self._grace = standing or Standing(), grace_seconds
        self._leave, self._write_stacks = leave, write_stacks
        self._before: dict[int, Any] = {}

    def install(self) -> "StopSignal":
        """Take over the signals of this process; one that is ignored, as SIGHUP under nohup, stays so."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        # Python writes the number of a signal into it at once, whatever the main thread is at
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Give the signals back, at the end of the run."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _watch(self) -> None:
        numbers = self._read(None)
        while numbers is not None and not numbers:
            numbers = self._read(None)
        if numbers is None:
            return
        name, status = signal.Signals(numbers[0]).name, 128 + numbers[0]
        self.received = self.received or name
        begin = last = idle = time.monotonic()
        count, has_written = 1, False
        while (numbers := self._read(_POLL)) is not None:
            now = time.monotonic()
            if numbers and now - last > _SAME:
                count, last = count + 1, now
                # a checkpoint that is being written is worth asking once more
                if count > (2 if self._standing.phase == "checkpoint" else 1):
                    again = f"{name}, and {signal.Signals(numbers[0]).name} {now - begin:.0f} s later"
                    self._leave(f"{again}: the run leaves at once, from {self._standing}", status)
            if now - begin > _WRITE_DOWN and not has_written and self._standing.since < begin:
                has_written = True
                self._write_stacks()
            if self._standing.phase in ("checkpoint", "end"):
                # also of one that had begun before the signal
                idle = now
            if now - idle > self._grace:
                self._leave(
                    f"{name}, and within {self._grace:g} s (distributed.grace_seconds) the run did not come to a "
                    f"checkpoint: it stands at {self._standing}",
                    status,
                )

    def _read(self, timeout: float | None) -> list[int] | None:
        """The numbers of our signals that have come, after at most `timeout` seconds; None at the end of the run."""
        if not select.select([self._reader], [], [], timeout)[0]:
            return []
        numbers = os.read(self._reader, 64)
        if not numbers:
            os.close(self._reader)
            return None
        return [number for number in numbers if number in self._before]
