"""Where numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from siglip_train.sinks import JsonLines, Record, Sink, TensorBoard, WeightsAndBiases

log = logging.getLogger(__name__)

# dense bf16 peak in TFLOP/s, from NVIDIA's data sheets (without sparsity)
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}


@dataclass
class LogConfig:
    """How often, and where besides metrics.jsonl.

    every_steps: optimizer steps from one line to the next. tensorboard: also for TensorBoard, in `run_dir/tensorboard`.
    wandb: also to Weights & Biases; offline = into a folder, to upload later. wandb_project: its project there.
    objective_gradient_every: steps, a multiple of every_steps, from one line to the next that also has
    `train/NAME_grad_norm`, the norm of each objective's gradient, times its weight, on towers, scale and bias; it costs
    a backward pass for each. 0 = never.
    """

    every_steps: int = 10
    objective_gradient_every: int = 0
    tensorboard: bool = False
    wandb: Literal["offline", "online", "disabled"] = "disabled"
    wandb_project: str = "siglip-train"

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {self.every_steps}")
        if self.objective_gradient_every < 0 or self.objective_gradient_every % self.every_steps:
            raise ValueError(
                f"objective_gradient_every is {self.objective_gradient_every}: give a multiple of every_steps "
                f"({self.every_steps}), or 0 for never"
            )


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
