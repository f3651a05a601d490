"""A step waits for the device once, also to end a run whose loss is not finite: at every ZeRO stage, cached or not."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from siglip_train import engine as engines
from siglip_train import engine_state, loop
from siglip_train.batch import Batch
from siglip_train.distributed.setup import World
from siglip_train.errors import UserError
from siglip_train.gradient_cache import cached_step
from siglip_train.models.siglip import Siglip
from siglip_train.objective_gradients import measured_step
from siglip_train.objectives.base import Objective
from siglip_train.objectives.classification import Classification
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.parameter_groups import build_optimizer
from tests.engine import test_engine as whole
from tests.ranks import run_ranks
from tests.test_gradient_cache import trainer
from tests.waits import waits

STEPS = {"plain": loop.plain_step, "cached": cached_step, "measured": partial(measured_step, every=1)}
# reads of the host's own memory: labels before they go to the device, flags after the wait
ON_HOST = ["classification.py counts", "loop.py read"]
WAIT = {0: "engine.py _step_without_zero", 1: "utils.py is_invalid_grad_norm"}


class Offset(Objective):
    """A sum whose gradient is finite, whatever is added to it."""

    def __init__(self):
        super().__init__()
        self.offset, self.told = 0.0, 0

    def forward(self, forward_pass):
        return {"samples": forward_pass.image_pooled.sum() + self.offset}

    def after_step(self):
        self.told += 1


def engine_of(stage: int, device: torch.device):
    """With several groups of parameters, each of which DeepSpeed by itself would wait for."""
    torch.manual_seed(0)
    objectives = {
        "sigmoid": SigmoidLoss(), "offset": Offset(), "classes": Classification(classes=7, width=20),
    }  # fmt: skip
    model = TrainingModel(Siglip(whole.CONFIG), objectives)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = engines.deepspeed_config(
        engines.EngineConfig(zero_stage=stage),
        world_size=world_size,
        precision="fp32",
        micro_batch_size=whole.GLOBAL_BATCH // world_size,
        clip_norm=whole.OPTIM.clip_norm,
    )
    optimizer = build_optimizer(model, whole.OPTIM, fused=True)
    assert len(optimizer.param_groups) > 1
    return engines.build_engine(model, optimizer, config=config, world=World(rank, world_size, rank, device))


def batch(step: int) -> Batch:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pairs = whole.batch(step, rank, world_size)
    return Batch({**pairs.parts, "labels": torch.arange(pairs.size) % 7}, ("key",) * pairs.size)


def of_a_step(stage: int, name: str, device: str = "cpu") -> list[str]:
    """Where the third step waits: the first ones compile, make connections and ask whether all ranks are alike."""
    engine = engine_of(stage, torch.device(device))
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device(device))
    run = trainer(engine, whole.GLOBAL_BATCH // world.world_size // 2)._replace(world=world)
    for step in range(2):
        STEPS[name](run, batch(step), step + 1)
    third = batch(2).each(lambda tensor: tensor.pin_memory() if device == "cuda" else tensor)
    with waits(torch.device(device)) as found:
        STEPS[name](run, third, 3)
    engine.destroy()
    return found


def of_steps(cells: list[tuple[int, str]]) -> list[list[str]]:
    return [of_a_step(*cell) for cell in cells]


@pytest.mark.dist
def test_the_host_waits_once_a_step():
    # at ZeRO 3 a measured step is refused, as the weights are let go of after one pass;
    # and DeepSpeed (0.19.8) asks all ranks for the order of modules in each step that has another, as a cached one has
    cells = [(stage, name) for stage in range(4) for name in STEPS if stage < 3 or name == "plain"]
    for ranks in run_ranks(2, of_steps, cells):
        for (stage, name), found in zip(cells, ranks, strict=True):
            expected = [ON_HOST[0], WAIT[min(stage, 1)], ON_HOST[1]]
            assert found == expected, f"ZeRO {stage}, {name}"


@pytest.mark.dist
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_waited_for_once_a_step() -> None:
    cells = [(stage, name, "cuda") for stage in range(4) for name in STEPS if stage < 3 or name == "plain"]
    (found,) = run_ranks(1, of_steps, cells, backend="nccl")
    for cell, places in zip(cells, found, strict=True):
        assert places == [WAIT[min(cell[0], 1)]], cell


def with_a_loss_that_is_infinite_on_rank_1(cells: list[tuple[int, str]]) -> list[tuple[str, bool, int]]:
    """What the second step raises, whether it left the weights as they were, and how often objectives were told."""
    found = []
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for stage, name in cells:
        engine = engine_of(stage, torch.device("cpu"))
        run = trainer(engine, whole.GLOBAL_BATCH // world_size // 2)
        offset = engine.module.objectives["offset"]
        STEPS[name](run, batch(0), 1)
        before = engine_state.gather_weights(engine)
        if rank == 1:
            offset.offset = float("inf")
        with pytest.raises(UserError) as raised:
            STEPS[name](run, batch(1), 2)
        after = engine_state.gather_weights(engine)
        is_same = all(torch.equal(after[key], value) for key, value in before.items())
        found.append((str(raised.value), is_same, offset.told))
        engine.destroy()
    return found


@pytest.mark.dist
def test_a_loss_that_is_infinite_on_one_rank_ends_all_by_name_and_leaves_the_weights() -> None:
    cells = [(0, "plain"), (0, "cached"), (1, "plain"), (3, "plain")]
    for rank in run_ranks(2, with_a_loss_that_is_infinite_on_rank_1, cells):
        for cell, (message, is_same, told) in zip(cells, rank, strict=True):
            assert message.startswith("the loss of offset is not finite on rank 1 at step 2; "), cell
            assert is_same, cell
            assert told == 1, cell
