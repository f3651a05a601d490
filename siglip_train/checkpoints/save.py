"""When a run saves a checkpoint, and which of the earlier ones it keeps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from siglip_train import engine_state
from siglip_train.checkpoints.write import CheckpointFolder, Progress
from siglip_train.distributed.collectives import broadcast_object
from siglip_train.errors import UserError
from siglip_train.interop.runs import checkpoints_in, step_of


@dataclass
class CheckpointConfig:
    """When to save and how many to keep; a checkpoint is always written at the end and on a stop signal.

    every_steps: optimizer steps from one to the next, 0 = not by steps. every_minutes: the same by the clock, 0 = not.
    keep: the newest so many stay. keep_every_steps: those at multiples of it stay too, 0 = none do.
    keep_at_samples: one is written at each of these sample counts, after the step that reaches it, and stays: for
    stages that go on from there.
    """

    every_steps: int = 1000
    every_minutes: float = 0.0
    keep: int = 2
    keep_every_steps: int = 0
    keep_at_samples: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.every_steps, self.every_minutes, self.keep_every_steps) < 0 or self.keep < 1:
            raise ValueError(
                "every_steps, every_minutes and keep_every_steps must not be negative (0 = off), "
                "keep must be at least 1"
            )
        if min(self.keep_at_samples, default=1) < 1:
            raise ValueError(f"keep_at_samples is {self.keep_at_samples}: give sample counts above 0")

    def steps_kept(self, global_batch_size: int) -> frozenset[int]:
        """The steps that reach `keep_at_samples`."""
        return frozenset(-(-samples // global_batch_size) for samples in self.keep_at_samples)


class Checkpoints:
    """Saves the checkpoints of one run, on time.

    write_weights: writes the export folder of the model from its state dict; called on rank 0 only.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        write_weights: Callable[[Path, dict[str, Tensor]], None],
        global_batch_size: int = 1,
    ) -> None:
        self._folder = CheckpointFolder(run_dir / "checkpoints", write_weights)
        self._config = config
        self._kept = config.steps_kept(global_batch_size)
        self._last_time = time.monotonic()
        self.last_step: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due at this step by count or by time. The clock is rank 0's. All ranks."""
        config = self._config
        if step in self._kept or (config.every_steps and step % config.every_steps == 0):
            return True
        if not config.every_minutes:
            return False
        return broadcast_object(time.monotonic() - self._last_time > 60 * config.every_minutes)

    def save(self, engine: Any, progress: Progress) -> None:
        """Write the checkpoint aside, then rename it; delete what is older than the newest `keep`. All ranks.

        Raises `UserError` on every rank when rank 0 cannot write (a full disk).
        """
        if self.last_step == progress.step:
            return
        weights = engine_state.gather_weights(engine)
        moments = engine_state.gather_moments(engine)
        failure = None
        if engine.global_rank == 0:
            try:
                newest = self._folder.write(weights, moments, progress)
                for old in self._aged(newest):
                    self._folder.remove(old)
            except (OSError, SafetensorError, UserError) as error:
                failure = (
                    f"cannot write a checkpoint to {self._folder.path}: {error}; earlier ones are untouched"
                )
        failure = broadcast_object(failure)
        if failure is not None:
            raise UserError(failure)
        self.last_step = progress.step
        self._last_time = time.monotonic()

    def _aged(self, newest: Path) -> list[Path]:
        """The checkpoints to delete, now that `newest` is complete and LAST names it."""
        config = self._config
        # later steps are of a time before the run went back, so they were saved earlier
        others = sorted(
            (path for path in checkpoints_in(self._folder.path) if path != newest),
            key=lambda path: (step_of(path) < step_of(newest), step_of(path)),
        )
        aged = others[: max(0, len(others) - (config.keep - 1))]
        every = config.keep_every_steps
        return [
            path for path in aged if (not every or step_of(path) % every) and step_of(path) not in self._kept
        ]
