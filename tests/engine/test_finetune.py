"""Fine-tuning at every ZeRO stage on two ranks: a head and adapters, saved merged, resumed as they were."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from siglip_train import engine as engines
from siglip_train import engine_state
from siglip_train.batch import Batch
from siglip_train.checkpoints.load import Saved, read_checkpoint, restore_weights
from siglip_train.checkpoints.save import CheckpointConfig, Checkpoints
from siglip_train.checkpoints.write import Progress
from siglip_train.data.image_transform import ImageTransform
from siglip_train.distributed.setup import World
from siglip_train.evals.base import Encoder
from siglip_train.evals.classification import HeadAccuracy
from siglip_train.interop.load import load_model
from siglip_train.interop.native import Description, write_export
from siglip_train.interop.runs import newest_checkpoint
from siglip_train.models.adapters import AdapterConfig, add_adapters, merged
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.classification import Classification
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.optim import OptimConfig
from siglip_train.parameter_groups import UnusedParameters, build_optimizer
from tests.data.conftest import encoded, picture
from tests.data.shard_files import sample, write_tar
from tests.engine import test_engine as whole
from tests.ranks import run_ranks

ADAPTERS = AdapterConfig(rank=3, pattern=r"^vision\.encoder\..*\.(query|value)$")
# large eps, as Adam would make whole steps of the rounding of a gradient near zero
OPTIM = OptimConfig(lr=1e-1, eps=1e-2, clip_norm=100.0)
STEPS = 2
# 13 images on two ranks, so that one has a filler
LABELS = [number % 3 for number in range(13)]


def training_model() -> TrainingModel:
    torch.manual_seed(0)
    model = Siglip(whole.CONFIG)
    add_adapters(model, ADAPTERS)
    return TrainingModel(model, {"head": Classification(classes=3, width=20)})


def batch(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    pairs = whole.batch(step, rank, world_size)
    labels = torch.randint(0, 3, (whole.GLOBAL_BATCH,), generator=torch.Generator().manual_seed(step))
    size = pairs.size
    return Batch(
        {"images": pairs.part("images"), "labels": labels[rank * size : (rank + 1) * size]}, ("",) * size
    )


def plain_run() -> tuple[list[float], TrainingModel]:
    """Losses in one process, torch alone, and the model after them."""
    model, history = training_model(), []
    optimizer = build_optimizer(model, OPTIM)
    for step in range(2 * STEPS):
        total = model(batch(step)).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(total.item())
    return history, model


def build(stage: int, saved: Saved | None = None):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = training_model()
    if saved is not None:
        restore_weights(model, saved, Path("saved"))
    config = engines.deepspeed_config(
        engines.EngineConfig(zero_stage=stage),
        world_size=world_size,
        precision="fp32",
        micro_batch_size=whole.GLOBAL_BATCH // world_size,
        clip_norm=OPTIM.clip_norm,
    )
    world = World(rank, world_size, rank, torch.device("cpu"))
    engine = engines.build_engine(model, build_optimizer(model, OPTIM), config=config, world=world)
    if saved is not None:
        engine_state.restore_moments(engine, saved.moments)
    return engine, world


def steps(engine, first: int) -> list[float]:
    history = []
    for step in range(first, first + STEPS):
        losses = engine(batch(step, dist.get_rank(), dist.get_world_size()))
        engine.backward(losses.total)
        engine.step()
        mean = losses.total.detach().clone()
        dist.all_reduce(mean)
        history.append(mean.item() / dist.get_world_size())
    return history


def finetune(folder: str, shard: str, stages: list[int]) -> list[dict]:
    """For each stage: STEPS steps, a checkpoint, and a new engine at the next stage that goes on from it."""
    results = []
    for stage in stages:
        engine, world = build(stage)
        watch = UnusedParameters(engine.module)
        before = steps(engine, 0)
        unused = watch.stop()
        run_dir = Path(folder) / str(stage)
        description = Description(whole.CONFIG)
        saver = Checkpoints(
            run_dir,
            CheckpointConfig(),
            lambda path, state, d=description: write_export(path, merged(state, ADAPTERS), d),
        )
        saver.save(engine, Progress(STEPS, STEPS * whole.GLOBAL_BATCH))
        encoder = Encoder(
            model=engine.module.model,
            tokenizer=lambda _: pytest.fail("no texts here"),
            transform=ImageTransform(16, 8),
            world=world,
            batch_size=4,
            heads=dict(engine.module.objectives.items()),
        )
        metrics = HeadAccuracy(shards=shard, objective="head").run(encoder).metrics
        engine.destroy()
        saved = read_checkpoint(newest_checkpoint(run_dir))
        resumed, _ = build((stage + 1) % 4, saved)
        results.append(
            {"losses": before + steps(resumed, STEPS), "unused": unused, "metrics": metrics,
             "moments": len(saved.moments)}
        )  # fmt: skip
        resumed.destroy()
    return results


def accuracy_after(model: TrainingModel) -> float:
    """By hand, one image at a time."""
    transform = ImageTransform(16, 8)
    hits = 0
    with torch.no_grad():
        for number, label in enumerate(LABELS):
            images = transform.batch([transform(picture(number))])
            forward_pass = ForwardPass(model.model, Batch({"images": images}))
            hits += int(model.objectives["head"].logits(forward_pass).argmax()) == label
    return hits / len(LABELS)


@pytest.mark.dist
@pytest.mark.parametrize("stages", [[3], pytest.param([0, 1, 2], marks=pytest.mark.slow)], ids=str)
def test_every_stage_equals_plain_adamw_and_resumes_and_saves_merged_weights(
    stages: list[int], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    rows = [
        sample(f"{number:03d}", number, png=encoded(picture(number)), cls=str(label).encode())
        for number, label in enumerate(LABELS)
    ]
    shard = write_tar(tmp_path / "0.tar", [member for row in rows for member in row])
    by_rank = run_ranks(2, finetune, str(tmp_path), str(shard), stages)
    expected, _ = plain_run()
    assert expected[0] == pytest.approx(1.0986123, rel=1e-6)
    trained = [name for name, p in training_model().named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 + 2, "two adapters in each of two blocks, and the head"
    live = training_model()
    for place, (stage, result) in enumerate(zip(stages, by_rank[0], strict=True)):
        assert result["losses"] == pytest.approx(expected, rel=3e-5), stage
        assert result["unused"] == []
        assert result["moments"] == 3 * len(trained)
        saved = read_checkpoint(newest_checkpoint(tmp_path / str(stage)))
        restore_weights(live, saved, tmp_path)
        images = batch(0).part("images")
        plain = load_model(tmp_path / str(stage)).model.encode_image(images)
        torch.testing.assert_close(plain, live.model.encode_image(images), rtol=0, atol=1e-6)
        assert result["metrics"]["acc1"] == pytest.approx(accuracy_after(live))
        assert result["metrics"]["n"] == len(LABELS)
        assert by_rank[1][place]["metrics"] == result["metrics"]
