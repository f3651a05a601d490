"""The log of each rank in its run's folder. Its last line is why the rank has ended, and nothing comes after it."""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import traceback
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from siglip_train.redact import RedactingFormatter, redacted

log = logging.getLogger("siglip_train")

_FORMAT = RedactingFormatter("%(asctime)s %(levelname)s %(message)s")


class _File(logging.FileHandler):
    """Says once that it cannot be written to, where logging would print a traceback for each message."""

    is_complete = False
    _has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, unless the reason for the end is written: another thread may have more to say."""
        if not self.is_complete:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802  # logging's names
        if not self._has_failed:
            self._has_failed = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)  # noqa: T201


class RankLog:
    """`log.txt` of rank 0 and `logs/rank-N.txt` of the others: messages, tracebacks, and why the rank has ended.

    wanted: the folder of the run, if it is known before the ranks have met: what ends a rank before is told there too.
    None = on the screen alone, until `open`.
    """

    def __init__(self, rank: int, wanted: Path | None) -> None:
        self._rank, self.folder = rank, wanted
        self._file: _File | None = None
        self._has_ended = False
        # whoever ends this rank holds it to the end: a signal and the failure of another rank may come together
        self._lock = threading.RLock()

    def open(self, run_dir: Path) -> logging.FileHandler:
        """Begin to write: messages go to the file in full, and to the screen. Raises `OSError`."""
        self.folder = run_dir
        self.close()
        file = self._open()
        # a segmentation fault, and what NCCL's own watchdog does
        faulthandler.enable(file.stream or sys.stderr)
        log.setLevel(logging.DEBUG)
        log.handlers = [file, _screen(self._rank)]
        log.propagate = False
        return file

    def forget(self) -> None:
        """Write no more to a folder that is another run's."""
        self.close()
        self.folder = None

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            if faulthandler.is_enabled():
                try:
                    faulthandler.enable()
                except (OSError, ValueError, AttributeError):
                    # the error stream is no file, as in a notebook; ours is about to be closed
                    faulthandler.disable()
            log.handlers, log.propagate = [], True
            self._file.close()
            self._file = None

    def end(self, reason: str, error: BaseException | None = None) -> bool:
        """Write the last line, after the traceback of `error`; False where that has been done.

        Only to the file: what ends a program says so on the screen itself.
        """
        with self._lock:
            if self._has_ended:
                return False
            self._has_ended = True
            if error is not None:
                self._write(logging.ERROR, "".join(traceback.format_exception(error)).rstrip())
            is_good = error is None and not reason.startswith("error")
            self._write(logging.INFO if is_good else logging.ERROR, reason, is_last=True)
            self.close()
            return True

    def leave(self, reason: str, status: int, *, stacks: bool) -> None:
        """End this process at once, from whichever thread, with the stacks of all; the reason is the last line."""
        with self._lock:
            if stacks:
                self.write_stacks()
            self.end(f"error: {reason}")
            # also where the main thread has written its last line: it says it on the screen after its clean-up
            print(redacted(f"error: {reason}"), file=sys.stderr, flush=True)  # noqa: T201
            os._exit(status)

    def write_stacks(self) -> None:
        """Where every thread of this process stands now; nothing after the last line."""
        with self._lock:
            if self._has_ended:
                return
            file = self._file or self._open_if_known()
            self._write(logging.ERROR, "all threads stand at:")
            faulthandler.dump_traceback((file and file.stream) or sys.stderr)

    def _write(self, level: int, message: str, *, is_last: bool = False) -> None:
        file = self._file or self._open_if_known()
        if file is not None:
            with file.lock or contextlib.nullcontext():
                file.handle(logging.LogRecord(log.name, level, "", 0, message, None, None))
                file.is_complete = is_last
            file.flush()

    def _open_if_known(self) -> _File | None:
        try:
            return self._open() if self.folder is not None else None
        except OSError:
            return None

    def _open(self) -> _File:
        assert self.folder is not None, "the folder is known"
        path = self.folder / ("log.txt" if self._rank == 0 else f"logs/rank-{self._rank}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _File(path, encoding="utf-8")
        self._file.setFormatter(_FORMAT)
        self._file.setLevel(logging.DEBUG)
        return self._file


def _screen(rank: int) -> logging.Handler:
    """Through rich on a terminal, plain lines otherwise; off rank 0 warnings alone."""
    screen: logging.Handler
    if rank == 0 and sys.stderr.isatty():
        screen = RichHandler(console=Console(stderr=True), show_path=False, level=logging.INFO)
        screen.setFormatter(RedactingFormatter("%(message)s"))
        return screen
    screen = logging.StreamHandler()
    if rank == 0:
        screen.setFormatter(RedactingFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        screen.setLevel(logging.INFO)
    else:
        screen.setFormatter(RedactingFormatter(f"[rank {rank}] %(message)s"))
        screen.setLevel(logging.WARNING)
    return screen
