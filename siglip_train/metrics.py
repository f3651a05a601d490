"""Where numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases on request; progress on screen."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from siglip_train.sinks import JsonLines, Record, Sink, TensorBoard, WeightsAndBiases

log = logging.getLogger(__name__)

# dense bf16 peak in TFLOP/s, from NVIDIA's data sheets (without sparsity)
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}


@dataclass
class LogConfig:
    """How often, and where besides metrics.jsonl.

    every_steps: optimizer steps from one line to the next. tensorboard: also for TensorBoard, in `run_dir/tensorboard`.
    wandb: also to Weights & Biases; offline = into a folder, to upload later. wandb_project: its project there.
    """

    every_steps: int = 10
    tensorboard: bool = False
    wandb: Literal["offline", "online", "disabled"] = "disabled"
    wandb_project: str = "siglip-train"

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {self.every_steps}")


class MetricWriter:
    """Appends one JSON object a call to `metrics.jsonl`, and forwards it. Rank 0 only.

    Raises `UserError` where a package is missing; whatever fails later is logged, and does not end the run.
    """

    def __init__(
        self, run_dir: Path, config: LogConfig, *, resumed_step: int, run_config: dict[str, Any]
    ) -> None:
        self._sinks = [
            # an attempt costs nothing
            Sink("metrics.jsonl", JsonLines(run_dir / "metrics.jsonl", resumed_step), first_pause=0)
        ]
        if config.tensorboard:
            self._sinks.append(Sink("TensorBoard", TensorBoard(run_dir / "tensorboard")))
        if config.wandb != "disabled":
            place = WeightsAndBiases(
                run_dir, project=config.wandb_project, mode=config.wandb, run_config=run_config
            )
            self._sinks.append(Sink("Weights & Biases", place))

    def write(self, step: int, samples_seen: int, metrics: dict[str, float]) -> None:
        """Record metrics of one step; the step is the common x axis, samples seen stand beside it."""
        record = Record(step, samples_seen, time.time(), metrics)
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Flush and finish every target."""
        for sink in self._sinks:
            sink.close()


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the GPU in FLOP/s; None where it is not known (then there is no MFU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in PEAK_TFLOPS.items() if key in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the GPU, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # POSIX only, and only needed here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
