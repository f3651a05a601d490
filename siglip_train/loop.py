"""The training loop: for each batch, step, log, save, evaluate. It knows an engine, an iterator and callables."""

import logging
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from siglip_train import engine as engines
from siglip_train import engine_state, optim
from siglip_train.batch import Batch
from siglip_train.checkpoints.save import Checkpoints
from siglip_train.checkpoints.write import Progress
from siglip_train.distributed.collectives import gather_objects, mean_over_ranks
from siglip_train.distributed.ring import exchange_seconds, waiting
from siglip_train.distributed.setup import World
from siglip_train.distributed.slow_ranks import SlowRank, Times, largest
from siglip_train.distributed.standing import Standing
from siglip_train.errors import UserError
from siglip_train.metrics import MetricWriter, memory_gib, peak_flops
from siglip_train.objectives.base import Losses
from siglip_train.objectives.training_model import Divisors
from siglip_train.optim import OptimConfig
from siglip_train.parameter_groups import UnusedParameters
from siglip_train.progress_display import ProgressDisplay
from siglip_train.supervision.stop_signal import StopSignal

log = logging.getLogger(__name__)


class BatchStream(Protocol):
    """What the loop needs of a loader: an endless stream of batches, its state and its counts."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> dict[str, Any]:
        """The state that resumes it after the last batch it gave out. All ranks."""
        ...

    def total_counts(self) -> dict[str, float]:
        """Samples seen, bad and substituted, over all ranks. All ranks."""
        ...


class Schedule(NamedTuple):
    """How long, and how often to log.

    micro_batch_size: pairs that a rank takes through the towers at once. flops_per_pair: of forward and backward once,
    which is what throughput and MFU count: neither activation checkpointing nor the gradient cache makes them larger.
    seed: of what modules draw in a step (dropout), so that a resumed run draws the same.
    """

    global_batch_size: int
    micro_batch_size: int
    total_samples: int
    last_step: int
    log_every: int
    evaluate_every: int
    flops_per_pair: float
    seed: int = 0


class StepReport(NamedTuple):
    """The results of one optimizer step: this rank's losses and the norm before clipping, all still on the device.

    measured: what else goes into the log, scalars that are the same on all ranks.
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    gradient_norm: torch.Tensor
    measured: Mapping[str, torch.Tensor] = MappingProxyType({})


class StopTraining(Exception):  # noqa: N818  # not an error
    """Raised on all ranks together when a stop signal came in the middle of an evaluation."""


# of a run, a batch and the number of the step; also returns whether any rank was asked to stop
TakeStep = Callable[["Trainer", Batch, int], tuple[StepReport, bool]]


class Trainer(NamedTuple):
    """The parts of a run that the loop drives. `writer` is None off rank 0. take_step: `plain_step`, for one."""

    engine: Any
    take_step: TakeStep
    loader: BatchStream
    optim: OptimConfig
    schedule: Schedule
    world: World
    checkpoints: Checkpoints
    writer: MetricWriter | None
    display: ProgressDisplay
    stop: StopSignal
    standing: Standing
    slow_rank: SlowRank
    evaluate: Callable[[int], dict[str, float]]


def train(run: Trainer, progress: Progress) -> Progress:
    """Train from `progress` to the schedule's last step or to a stop signal; a checkpoint is written at the end.

    Returns how far it came. All ranks. Raises `UserError` at a loss or gradient that is not finite.
    """
    timer = _Timer(run)
    watch: UnusedParameters | None = UnusedParameters(run.engine.module)
    batches: Iterable[Batch] = iter(run.loader)
    at, first = run.standing.at, progress.step + 1
    while progress.step < run.schedule.last_step:
        with timer.waiting_for_data():
            at("data", progress.step + 1)
            batch = next(batches)  # type: ignore[call-overload]
        # which compiles, and makes connections
        at("first step" if progress.step + 1 == first else "step")
        lr = _set_learning_rates(run, progress.samples_seen)
        torch.manual_seed(_seed_of_step(run, progress.step))
        report, stop = run.take_step(run, batch, progress.step + 1)
        progress = progress._replace(
            step=progress.step + 1, samples_seen=progress.samples_seen + run.schedule.global_batch_size
        )
        if watch is not None:
            _warn_of_unused(watch)
            watch = None
        metrics = None
        at("metrics")
        if progress.step % run.schedule.log_every == 0 or progress.step == run.schedule.last_step:
            metrics = {**_loss_metrics(run, report), "train/lr": lr, **timer.metrics()}
            counts = {f"data/{name}": float(count) for name, count in run.loader.total_counts().items()}
            if run.writer is not None:
                run.writer.write(progress.step, progress.samples_seen, {**metrics, **counts})
        run.display.step(progress.step, metrics)
        if stop:
            log.info(
                "%s: saving at step %d and leaving",
                run.stop.received or "stop signal on a rank",
                progress.step,
            )
            break
        # an evaluation that fails is no reason to lose what was trained
        if run.checkpoints.is_due(progress.step) or progress.step == run.schedule.last_step:
            _save(run, progress)
        if _evaluation_due(run, progress.step) and not _evaluate(run, progress):
            break
        timer.restart_if(
            paused=run.checkpoints.last_step == progress.step or _evaluation_due(run, progress.step)
        )
    _save(run, progress)
    return progress


def _seed_of_step(run: Trainer, step: int) -> int:
    return zlib.crc32(f"{run.schedule.seed} {step} {run.world.rank}".encode())


def _warn_of_unused(watch: UnusedParameters) -> None:
    names = watch.stop()
    if names:
        log.warning(
            "%d parameters got no gradient in the first step (%s%s): weight decay alone will change them; freeze what "
            "no objective trains, optim.rules=[{pattern: …, frozen: true}]",
            len(names),
            ", ".join(names[:3]),
            ", …" if len(names) > 3 else "",
        )


def _save(run: Trainer, progress: Progress) -> None:
    run.standing.at("checkpoint")
    run.checkpoints.save(run.engine, progress._replace(loader=run.loader.state()))


def plain_step(run: Trainer, batch: Batch, step: int) -> tuple[StepReport, bool]:
    """Take one forward, backward and optimizer step; also return whether any rank was asked to stop. All ranks."""
    losses = run.engine(batch.to(run.world.device), divisors(run, batch))
    flags = Flags(run, losses)
    run.engine.backward(spoilt_unless_finite(losses.total))
    return update_weights(run, losses, flags, step)


def divisors(run: Trainer, batch: Batch) -> Divisors:
    """What this rank's sum of each task is divided by: its global count, at least 1, over the number of ranks.

    The engine takes the mean of gradients over ranks, so the gradient is that of the mean over the global batch. One
    small all-reduce before the first backward, for which the host does not wait. All ranks.
    """
    counts = run.engine.module.counts(batch)
    values = torch.tensor(list(counts.values()), dtype=torch.float64).to(run.world.device, non_blocking=True)
    # ranks that are late, by their data say, are met here first: that is no compute of those that wait
    with waiting(run.world.device):
        dist.all_reduce(values)
    return dict(zip(counts, (values.clamp(min=1) / run.world.world_size).unbind(), strict=True))


def spoilt_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself, or NaN with a gradient of NaN, which no rank can take a step with: nobody need be asked."""
    return loss * (1 + 0 * loss.detach())


class Flags:
    """What ranks tell one another in a step: which losses are not finite, and whether any is asked to stop.

    One small all-reduce that runs beside the backward pass. The host does not wait for it: it is `read` once the host
    has waited for the norm of the gradients, which comes later. All ranks.
    """

    def __init__(self, run: Trainer, losses: Losses) -> None:
        self._ranks, self._names = run.world.world_size, list(run.engine.module.objectives)
        values = torch.stack([losses.total.detach(), *(losses.terms[name] for name in self._names)])
        bad = ~values.isfinite()
        self._flags = torch.zeros(self._ranks + len(bad), device=run.world.device)
        self._flags[run.world.rank] = bad.any()
        self._flags[self._ranks : -1] = bad[1:]
        self._flags[-1] = float(run.stop.received is not None)
        self._sent = dist.all_reduce(self._flags, async_op=True)

    def copy_to_host(self) -> None:
        """Have what all ranks have told copied; call it before what the host waits for."""
        self._sent.wait()
        is_on_gpu = self._flags.device.type == "cuda"
        self._told = torch.empty(self._flags.shape, pin_memory=is_on_gpu).copy_(
            self._flags, non_blocking=True
        )
        self._copied = torch.cuda.current_stream().record_event() if is_on_gpu else None

    def read(self) -> tuple[str | None, bool]:
        """What is not finite and where, if anything, and whether any rank was asked to stop."""
        if self._copied is not None:
            # it is: this is for the order of memory accesses
            self._copied.synchronize()
        *told, stop = self._told.tolist()
        ranks = ", ".join(str(rank) for rank, flag in enumerate(told[: self._ranks]) if flag)
        names = " and ".join(
            name for name, flag in zip(self._names, told[self._ranks :], strict=True) if flag
        )
        what = f"the loss of {names}" if names else "the loss"
        return f"{what} is not finite on rank {ranks}" if ranks else None, stop > 0


def update_weights(
    run: Trainer,
    losses: Losses,
    flags: Flags,
    step: int,
    measured: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> tuple[StepReport, bool]:
    """Take the optimizer step of the gradients in the engine, unless they are not finite. All ranks.

    Here the host waits for the device, once a step. Raises `UserError`, with all weights as they were, where a loss or
    the gradient is not finite on any rank.
    """
    flags.copy_to_host()
    update = engines.take_step(run.engine)
    not_finite, stop = flags.read()
    if not_finite is not None:
        raise UserError(f"{not_finite} at step {step}; {_last_good(run)}")
    if not update.is_applied:
        raise UserError(f"the gradient norm at step {step} is {float(update.norm)}; {_last_good(run)}")
    run.engine.module.after_step()
    return StepReport(losses.total.detach(), losses.terms, update.norm, measured), stop


def _last_good(run: Trainer) -> str:
    last = run.checkpoints.last_step
    return "no checkpoint was written yet" if last is None else f"the last good checkpoint is step-{last:08d}"


def _set_learning_rates(run: Trainer, samples_seen: int) -> float:
    """Set every group's learning rate for the next step; return the base rate."""
    batch, total = run.schedule.global_batch_size, run.schedule.total_samples
    lr = run.optim.lr * optim.schedule(run.optim, samples_seen=samples_seen, batch=batch, total_samples=total)
    for group in run.engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
    return lr


def _loss_metrics(run: Trainer, report: StepReport) -> dict[str, float]:
    added = run.engine.module.metrics(lambda parameter: engine_state.scalar(run.engine, parameter))
    losses = {"loss": report.total, **{f"{name}_loss": value for name, value in report.terms.items()}}
    measured = {**report.measured, "grad_norm": report.gradient_norm}
    values = torch.stack([value.double() for value in (*losses.values(), *measured.values())]).tolist()
    of_rank, of_all = values[: len(losses)], dict(zip(measured, values[len(losses) :], strict=True))
    found = {**added, **of_all, "grad_norm_clipped": min(of_all["grad_norm"], run.optim.clip_norm)}
    return {
        **mean_over_ranks({f"train/{name}": value for name, value in zip(losses, of_rank, strict=True)}),
        **{f"train/{name}": value for name, value in found.items()},
    }


def _evaluation_due(run: Trainer, step: int) -> bool:
    every = run.schedule.evaluate_every
    return step == run.schedule.last_step or (every > 0 and step % every == 0)


def _evaluate(run: Trainer, progress: Progress) -> bool:
    """Evaluate and record; False when a stop signal ended it early. All ranks."""
    run.standing.at("evaluation")
    try:
        metrics = run.evaluate(progress.step)
    except StopTraining:
        log.info(
            "%s: leaving the evaluation, saving at step %d",
            run.stop.received or "stop signal on a rank",
            progress.step,
        )
        return False
    if metrics and run.writer is not None:
        run.writer.write(progress.step, progress.samples_seen, metrics)
    return True


class _Timer:
    """Measures the time of the steps since the last log: waiting for data, exchange between ranks, and the rest."""

    def __init__(self, run: Trainer) -> None:
        self._run = run
        self._peak = peak_flops(run.world.device)
        self._restart()

    def _restart(self) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        exchange_seconds()

    def restart_if(self, *, paused: bool) -> None:
        """Restart after a checkpoint or an evaluation, so that their time does not count as a step's."""
        if paused:
            self._restart()

    def waiting_for_data(self) -> "_Timer":
        return self

    def __enter__(self) -> None:
        self._wait_begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._wait_begin
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Means per step over ranks, in seconds, and rates over all ranks. All ranks."""
        world, schedule = self._run.world, self._run.schedule
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds = (time.perf_counter() - self._begin) / self._steps
        ranks = gather_objects(
            Times(socket.gethostname(), seconds, self._waited / self._steps, exchange_seconds() / self._steps)
        )
        self._restart()
        if world.is_main:
            self._run.slow_rank.seen(ranks)
        step = mean(times.step for times in ranks)
        data = mean(times.data for times in ranks)
        exchange = mean(times.exchange for times in ranks)
        rate = schedule.global_batch_size / step
        flops = rate * schedule.flops_per_pair / world.world_size
        metrics = {
            "train/step_time": step,
            "train/data_time": data,
            "train/exchange_time": exchange,
            "train/compute_time": step - data - exchange,
            **{f"train/{name}": value for name, value in largest(ranks).items()},
            "train/samples_per_second": rate,
            "train/samples_per_second_per_rank": rate / world.world_size,
            "train/tflops_per_rank": flops / 1e12,
            "train/memory_gib": memory_gib(world.device),
        }
        if self._peak is not None:
            metrics["train/mfu"] = flops / self._peak
        return metrics
