"""The norm of each objective's gradient on shared weights: that of torch alone, on any number of ranks."""

from functools import partial

import pytest
import torch

from siglip_train import engine_state, loop, train
from siglip_train.config import Config
from siglip_train.data.batch_pieces import RankShare
from siglip_train.errors import UserError
from siglip_train.metrics import LogConfig
from siglip_train.objective_gradients import measured_step
from siglip_train.typed import build
from tests.composing import filled
from tests.engine import test_engine as whole
from tests.objectives.test_lifecycle import deepspeed_engine, taken, training_model
from tests.ranks import run_ranks
from tests.test_gradient_cache import trainer

STEPS = 2


def in_one_process() -> dict[str, float]:
    """Of the first step, by torch alone."""
    model, found = training_model(), {}
    for name in model.objectives:
        model.zero_grad()
        losses = model(
            whole.batch(0), None, lambda model, forward_pass, name=name: weighted(model, forward_pass, name)
        )
        losses.backward()
        gradients = [weight.grad for weight in model.model.parameters() if weight.grad is not None]
        found[f"{name}_grad_norm"] = torch.nn.utils.get_total_norm(gradients).item()
    return found


def weighted(model, forward_pass, name):
    divisors = {key: torch.tensor(max(1, count)) for key, count in model.counts(forward_pass.batch).items()}
    return model.losses(forward_pass, divisors, [name]).total


def on_a_rank(stage: int) -> tuple[dict[str, float], list[dict[str, torch.Tensor]], list[list[list[float]]]]:
    """What a measured step finds, and the losses and weights of steps with and without."""
    engine = deepspeed_engine(training_model(), stage)
    report, _ = measured_step(trainer(engine, 0), whole.batch(0, *ranks()), 1, every=1)
    engine.destroy()
    weights, told = [], []
    for take_step in (partial(measured_step, every=2), loop.plain_step):
        engine = deepspeed_engine(training_model(), stage)
        told.append(taken(engine, take_step, 0, 0, STEPS))
        weights.append(engine_state.gather_weights(engine))
        engine.destroy()
    return dict(report.measured), weights, told


def ranks() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def check(world_size: int, stage: int) -> None:
    expected = in_one_process()
    assert set(expected) == {"sigmoid_grad_norm", "scored_grad_norm"}
    for rank, (found, (measured, plain), told) in enumerate(run_ranks(world_size, on_a_rank, stage)):
        assert found == pytest.approx(expected, rel=1e-5)
        assert told[0] == told[1], "the losses are those of steps that measure nothing"
        assert rank > 0 or measured
        for name, weight in measured.items():
            assert (weight == plain[name]).all(), name


@pytest.mark.dist
def test_two_ranks_at_stage_2_find_the_norms_of_one_process_and_train_as_without() -> None:
    check(2, 2)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_one_and_two_ranks_at_every_stage_that_keeps_its_weights(world_size: int, stage: int) -> None:
    check(world_size, stage)


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        (["micro_batch_size=8"], "the gradient cache .*micro_batch_size=null"),
        (["engine.zero_stage=3"], "ZeRO 3 .*engine.zero_stage=2 or lower"),
    ],
)
def test_what_keeps_no_graph_is_refused_with_the_remedy(keys: list[str], remedy: str) -> None:
    config = build(Config, filled("experiment=quickstart", "log.objective_gradient_every=50", *keys))
    with pytest.raises(UserError, match=remedy):
        train._take_step(config, RankShare(config.global_batch_size))


def test_it_is_measured_at_logged_steps() -> None:
    with pytest.raises(ValueError, match="give a multiple of every_steps"):
        LogConfig(every_steps=10, objective_gradient_every=25)
