"""The decoder's objective on several ranks, at every ZeRO stage and with the gradient cache, equals one process.

Captions drawn to be parallel, samples without regions and ranks without any are among the batches, and the decoder
reads the text tower's embedding, whose parameter it shares.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from siglip_train import loop
from siglip_train.batch import Batch
from siglip_train.data.inputs.captions import CaptionSentences
from siglip_train.data.sentences import Sentences
from siglip_train.gradient_cache import cached_step
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.captioning import TASKS, Captioning
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel
from tests.engine import test_engine as whole
from tests.objectives.test_lifecycle import deepspeed_engine
from tests.ranks import run_ranks
from tests.test_gradient_cache import trainer

STEPS, LENGTH = 3, 8


def training_model() -> TrainingModel:
    torch.manual_seed(0)
    sizes = {
        "width": 20, "depth": 1, "mlp_dim": 35, "heads": 5, "vision_width": 20, "vocab_size": 31,
        "context_length": LENGTH, "embedding": "text_tower",
    }  # fmt: skip
    objective = Captioning(decoder=sizes)
    nn.init.normal_(objective.decoder.logits.weight, std=0.3)
    return TrainingModel(Siglip(whole.CONFIG), {"sigmoid": SigmoidLoss(), "captioning": objective})


def batch(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """The batch of the engine's tests, with sentences; the last third of a batch has no regions."""
    size, generator = whole.GLOBAL_BATCH, torch.Generator().manual_seed(100 + step)
    found = {}
    for task in TASKS:
        tokens = torch.randint(31, (size, LENGTH), generator=generator)
        ends = torch.randint(3, LENGTH + 1, (size, 1), generator=generator)
        places = torch.arange(LENGTH)
        counted = (places >= 2) & (places < ends)
        if task != "cap":
            counted[2 * size // 3 :] = False
        found[task] = Sentences(tokens, counted)
    draw = torch.rand(size, generator=generator)
    captions = CaptionSentences(found.pop("cap"), draw)
    share = slice(rank * size // world_size, (rank + 1) * size // world_size)
    sentences = Batch({"caption_sentences": captions, "regions": found}).rows(share)
    return Batch({**whole.batch(step, rank, world_size).parts, **sentences.parts})


def in_one_process() -> list[list[float]]:
    """The whole batch at once, by torch alone."""
    model = training_model()
    optimizer, told = whole.build_optimizer(model, whole.OPTIM), []
    for step in range(STEPS):
        losses = model(batch(step))
        losses.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), whole.OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        told.append([losses.total.item(), *(value.item() for value in losses.terms.values())])
    return told


def on_a_rank(cells: list[tuple[int, int]]) -> list[list[list[float]]]:
    """For each (ZeRO stage, micro-batch size; 0 = none): the global losses of each step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    for stage, micro_batch_size in cells:
        engine = deepspeed_engine(training_model(), stage)
        run, told = trainer(engine, micro_batch_size), []
        take_step = cached_step if micro_batch_size else loop.plain_step
        for step in range(STEPS):
            report, _ = take_step(run, batch(step, rank, world_size), step + 1)
            values = torch.stack([report.total, *report.terms.values()])
            dist.all_reduce(values)
            told.append((values / world_size).tolist())
        engine.destroy()
        found.append(told)
    return found


def check(world_size: int, cells: list[tuple[int, int]]) -> None:
    expected = torch.tensor(in_one_process())
    # total, sigmoid, captioning and its three tasks
    assert expected.shape == (STEPS, 6)
    for by_cell in run_ranks(world_size, on_a_rank, cells):
        for told in by_cell:
            torch.testing.assert_close(torch.tensor(told), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_two_ranks_at_stage_3_with_the_gradient_cache_equal_one_process() -> None:
    check(2, [(3, 3)])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_stage_with_and_without_the_gradient_cache_equals_one_process(world_size: int) -> None:
    share = whole.GLOBAL_BATCH // world_size
    check(world_size, [(stage, size) for stage in range(4) for size in (0, share // 3)])
