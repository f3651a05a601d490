"""An objective with all that one may have: a head, a running average, a metric, a task that not every sample is in.

It needs nothing but its own class. On 2 and 4 ranks, at every ZeRO stage, with and without the gradient cache,
and after a resume it gives the losses and the average of one process.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from siglip_train import engine as engines
from siglip_train import engine_state, loop
from siglip_train.checkpoints.load import read_checkpoint, restore_weights
from siglip_train.checkpoints.save import CheckpointConfig, Checkpoints
from siglip_train.checkpoints.write import Progress
from siglip_train.data.config import ViewsConfig
from siglip_train.distributed.collectives import is_distributed
from siglip_train.gradient_cache import cached_step
from siglip_train.interop.native import Description, write_export
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.base import Objective, StepSizes
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.parameter_groups import build_optimizer
from tests.engine import test_engine as whole
from tests.ranks import run_ranks
from tests.test_gradient_cache import trainer

STEPS, RESUMED_AT = 4, 2
MOMENTUM = 0.75


class Scored(Objective):
    """Two tasks: `even`, of the samples whose first token is even, and `all`. Remembers the mean score of the even."""

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.task_weights = {"even": 2.0}
        self.head = nn.Linear(whole.CONFIG.vision.width, 1)
        self.register_buffer("average", torch.zeros(2))  # of the score, and how many steps it knows
        self._seen = torch.zeros(2)
        self.steps_told = 0

    def counts(self, batch):
        return {"even": int((batch.part("texts")[:, 0] % 2 == 0).sum()), "all": batch.size}

    def forward(self, forward_pass):
        scores = self.head(forward_pass.image_pooled).squeeze(1)
        is_even = (forward_pass.batch.part("texts")[:, 0] % 2 == 0).to(scores.dtype)
        if self.training:
            self._seen += torch.stack([(scores * is_even).sum(), is_even.sum()]).detach()
        surprise = (scores - 1 - self.average[0]).square()
        return {"even": (surprise * is_even).sum(), "all": scores.square().sum()}

    def after_step(self):
        if is_distributed():
            dist.all_reduce(self._seen)
        mean = self._seen[0] / self._seen[1].clamp(min=1)
        self.average[0].lerp_(mean, 1 - MOMENTUM)
        self.average[1] += 1
        self._seen.zero_()
        self.steps_told += 1

    def metrics(self):
        return {"average": self.average[0].item()}

    def flops_per_sample(self, sizes):
        return 6.0 * self.head.in_features


def training_model() -> TrainingModel:
    torch.manual_seed(0)
    return TrainingModel(Siglip(whole.CONFIG), {"sigmoid": SigmoidLoss(weight=0.5), "scored": Scored()})


def deepspeed_engine(model: TrainingModel, stage: int):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = engines.deepspeed_config(
        engines.EngineConfig(zero_stage=stage),
        world_size=world_size,
        precision="fp32",
        micro_batch_size=whole.GLOBAL_BATCH // world_size,
        clip_norm=whole.OPTIM.clip_norm,
    )
    # without this ZeRO-3 would keep parameters as small as these whole on every rank
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    world = whole.World(rank, world_size, rank, torch.device("cpu"))
    return engines.build_engine(model, build_optimizer(model, whole.OPTIM), config=config, world=world)


def taken(engine, take_step, micro_batch_size: int, first: int, end: int) -> list[list[float]]:
    """Global losses, total and terms, and the metric, of each step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    run, told = trainer(engine, micro_batch_size), []
    scored = engine.module.objectives["scored"]
    assert scored.average[1] == first
    for step in range(first, end):
        report, _ = take_step(run, whole.batch(step, rank, world_size), step + 1)
        values = torch.stack([report.total, *report.terms.values()])
        dist.all_reduce(values)
        metric = scored.metrics()["average"]
        told.append([*(values / world_size).tolist(), metric])
    assert scored.steps_told == end - first
    return told


def save(engine, folder: Path, step: int) -> None:
    description = Description(whole.CONFIG)
    checkpoints = Checkpoints(
        folder, CheckpointConfig(), lambda path, state: write_export(path, state, description)
    )
    checkpoints.save(engine, Progress(step=step, samples_seen=step * whole.GLOBAL_BATCH))
    dist.barrier()


def resumed(model: TrainingModel, folder: Path, step: int, stage: int):
    saved = read_checkpoint(folder / "checkpoints" / f"step-{step:08d}")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    restore_weights(model, saved, folder)
    engine = deepspeed_engine(model, stage)
    engine_state.restore_moments(engine, saved.moments)
    return engine


def through_a_resume(
    cells: list[tuple[int, int]],
    folder: Path,
    make: Callable[[], TrainingModel],
    take: Callable[..., list[list[float]]],
) -> list[list[list[float]]]:
    """For each (ZeRO stage, micro-batch size; 0 = none): a few steps, saved and resumed at the next stage.

    take: `taken`, or another with its arguments.
    """
    found = []
    for stage, micro_batch_size in cells:
        take_step = cached_step if micro_batch_size else loop.plain_step
        here = folder / f"{stage}-{micro_batch_size}"
        engine = deepspeed_engine(make(), stage)
        told = take(engine, take_step, micro_batch_size, 0, RESUMED_AT)
        save(engine, here, RESUMED_AT)
        engine.destroy()
        engine = resumed(make(), here, RESUMED_AT, (stage + 1) % 4)
        told += take(engine, take_step, micro_batch_size, RESUMED_AT, STEPS)
        engine.destroy()
        found.append(told)
    return found


def on_a_rank(cells: list[tuple[int, int]], folder: Path) -> list[list[list[float]]]:
    return through_a_resume(cells, folder, training_model, taken)


def in_one_process() -> list[list[float]]:
    """The whole batch at once, by torch alone."""
    model = training_model()
    optimizer, told = build_optimizer(model, whole.OPTIM), []
    for step in range(STEPS):
        batch = whole.batch(step)
        losses = model(batch)
        losses.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), whole.OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        values = [losses.total, *losses.terms.values()]
        told.append([*(value.item() for value in values), model.objectives["scored"].metrics()["average"]])
    return told


def check(world_size: int, cells: list[tuple[int, int]], folder: Path) -> None:
    expected = torch.tensor(in_one_process())
    # total, sigmoid, scored and its two tasks, the metric
    assert expected.shape == (STEPS, 6)
    for by_cell in run_ranks(world_size, on_a_rank, cells, folder):
        for told in by_cell:
            torch.testing.assert_close(torch.tensor(told), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_two_ranks_at_stage_3_with_the_gradient_cache_and_a_resume_equal_one_process(tmp_path: Path) -> None:
    check(2, [(3, 3)], tmp_path)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_stage_with_and_without_the_gradient_cache_equals_one_process(
    world_size: int, tmp_path: Path
) -> None:
    share = whole.GLOBAL_BATCH // world_size
    check(world_size, [(stage, size) for stage in range(4) for size in (0, share // 3)], tmp_path)


def test_a_term_is_the_weighted_sum_of_the_means_of_its_tasks_and_an_empty_task_is_zero() -> None:
    model, batch = training_model(), whole.batch(0)
    losses = model(batch)
    assert list(losses.terms) == ["sigmoid", "scored", "scored/even", "scored/all"]
    terms = losses.terms
    assert terms["scored"].item() == pytest.approx((2 * terms["scored/even"] + terms["scored/all"]).item())
    assert losses.total.item() == pytest.approx((0.5 * terms["sigmoid"] + terms["scored"]).item())
    odd = batch._replace(parts={**batch.parts, "texts": torch.full_like(batch.part("texts"), 7)})
    assert model.counts(odd)["scored/even"] == 0
    empty = model(odd)
    assert empty.terms["scored/even"] == 0
    empty.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_what_an_objective_adds_is_in_the_log_and_in_the_cost_of_a_step() -> None:
    model = training_model()
    found = model.metrics(lambda parameter: parameter.item())
    assert found == {"logit_scale": pytest.approx(10.0), "logit_bias": -10.0, "scored/average": 0.0}
    assert model.flops_per_sample(StepSizes(whole.CONFIG, ViewsConfig())) == 6.0 * whole.CONFIG.vision.width


def test_a_scale_beyond_all_floats_is_infinite_and_does_not_end_the_run_by_itself() -> None:
    assert training_model().metrics(lambda parameter: 800.0)["logit_scale"] == math.inf
