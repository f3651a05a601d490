"""The progress of a run on the screen."""

import contextlib
import logging
import time
from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class ProgressDisplay:
    """A rich bar on a terminal, a plain line for each logged step otherwise. Silent off rank 0."""

    def __init__(self, *, total_steps: int, start_step: int, is_main: bool, is_terminal: bool) -> None:
        self._is_main = is_main
        self._total = total_steps
        self._start = start_step
        self._bar: Progress | None = None
        if is_main and is_terminal:
            self._bar = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def start(self) -> None:
        """Training begins now."""
        self._begin = time.monotonic()
        with self._while_there_is_a_terminal() as bar:
            if bar is not None:
                bar.start()

    def step(self, step: int, metrics: dict[str, float] | None) -> None:
        """Advance; `metrics` are the logged ones of this step, None at a step that is not logged."""
        if not self._is_main:
            return
        with self._while_there_is_a_terminal() as bar:
            if bar is not None:
                bar.update(self._task, completed=step)
        if metrics is None:
            return
        text = (
            f"loss {metrics['train/loss']:.4f}  {metrics['train/samples_per_second']:.0f} samples/s  "
            f"data wait {100 * metrics['train/data_time'] / metrics['train/step_time']:.0f} %"
        )
        with self._while_there_is_a_terminal() as bar:
            if bar is not None:
                bar.update(self._task, description=text)
        if self._bar is not None:
            log.debug("step %d  %s", step, text)
        else:
            log.info("step %d/%d  %s  ETA %s", step, self._total, text, self._remaining(step))

    def _remaining(self, step: int) -> str:
        done = max(1, step - self._start)
        seconds = int((time.monotonic() - self._begin) / done * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        """Leave the terminal as it was."""
        with self._while_there_is_a_terminal() as bar:
            if bar is not None:
                bar.stop()

    @contextlib.contextmanager
    def _while_there_is_a_terminal(self) -> Iterator[Progress | None]:
        """The bar; from the moment on that its terminal is lost there is none."""
        try:
            yield self._bar
        except OSError:
            self._bar = None
