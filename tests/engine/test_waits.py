"""A step waits for the device once, at every ZeRO stage, with and without the gradient cache and other extras."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from siglip_train import engine as engines
from siglip_train import loop
from siglip_train.batch import Batch
from siglip_train.distributed.setup import World
from siglip_train.gradient_cache import cached_step
from siglip_train.models.siglip import Siglip
from siglip_train.objective_gradients import measured_step
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


def engine_of(stage: int, device: torch.device):
    """With several groups of parameters, each of which DeepSpeed by itself would wait for."""
    torch.manual_seed(0)
    objectives = {"sigmoid": SigmoidLoss(), "classes": Classification(classes=7, width=20)}
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
