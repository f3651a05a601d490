"""A locked tower's embeddings, made once: training as with images, and towers that are not locked refused."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from siglip_train import loop, train
from siglip_train.checkpoints.write import Progress
from siglip_train.data.config import DataConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.embedding_cache import folder_of
from siglip_train.errors import UserError
from siglip_train.models.adapters import AdapterConfig, add_adapters
from siglip_train.models.siglip import Siglip
from tests.forks import run_program
from tests.objectives.tiny import tiny_model
from tests.test_train import data_counts, losses, records

TRANSFORM = ImageTransform(16, 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_run: list[str], tiny_data: Path) -> Path:
    """`start` trains a tower, and the others a text tower to it: `images` as ever, `makes` and `reads` by rows.

    So does `ranks`, on two ranks at ZeRO 3, with workers, rows of its own, and in micro-batches.
    """
    folder = tmp_path_factory.mktemp("embedding_cache")
    base = [argument for argument in small_run if not argument.startswith(("evaluation.", "total", "checkp"))]
    base += ["~evaluation.tasks", "total_samples=72"]
    siglit = [
        "+evaluation.tasks.loss._target_=siglip_train.evals.validation_loss.ValidationLoss",
        f"+evaluation.tasks.loss.shards={tiny_data}/validation/*.tar", "+evaluation.tasks.loss.reference_batch=8",
        f"init_from={folder}/start", "init_skip=[text., logit_]", "seed=1", "data.flip=false",
        "optim.rules=[{pattern: model.vision., frozen: true}, {pattern: logit_, decay: false}]",
    ]  # fmt: skip
    rows = f"data.embedding_dir={folder}/rows"
    commands = [
        (1, "start", base),
        (1, "pictures", [*base, *siglit]),
        (1, "makes", [*base, *siglit, rows]),
        (1, "reads", [*base, *siglit, rows, "engine.zero_stage=0"]),
        (2, "ranks", [*base, *siglit, f"{rows}_of_two", "engine.zero_stage=3", "micro_batch_size=4", "data.workers=1"]),
    ]  # fmt: skip
    for ranks, name, arguments in commands:
        result = run_program("siglip_train.train", [*arguments, f"run_dir={folder}/{name}"], ranks=ranks)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.dist
def test_rows_train_as_pictures_do_and_are_made_once(runs: Path) -> None:
    expected, validation = losses(runs / "pictures"), records(runs / "pictures")[-1]["val/loss/loss"]
    assert sorted(expected) == [1, 2, 3]
    for name in ("makes", "reads", "ranks"):
        for step, loss in losses(runs / name).items():
            # measured 4e-6; a number of a row is rounded by up to 5e-4 of itself
            assert loss == pytest.approx(expected[step], rel=2e-5), f"{name}, step {step}"
        assert data_counts(runs / name)[-1] == data_counts(runs / "pictures")[-1]
        # the tower itself is evaluated
        assert records(runs / name)[-1]["val/loss/loss"] == pytest.approx(validation, rel=2e-5)
    logs = [(runs / name / "log.txt").read_text() for name in ("makes", "reads")]
    assert "embeddings: 4 of 4 shards" in logs[0]
    assert "embedded 600 of 600 images" in logs[0]
    assert "embeddings: 0 of 4 shards" in logs[1]
    one, two = (
        {file.name: np.load(file).astype(float) for file in (runs / folder).glob("*/*.npy")}
        for folder in ("rows", "rows_of_two")
    )
    assert one.keys() == two.keys()
    for name, rows in one.items():
        # in other batches the last bit of a float16 may fall otherwise
        np.testing.assert_allclose(two[name], rows, rtol=1e-3, atol=1e-5)


def test_a_stop_signal_ends_the_embedding_without_a_checkpoint() -> None:
    closed = []

    def stopped() -> None:
        raise loop.StopTraining

    display, writer = (
        SimpleNamespace(close=lambda part=part: closed.append(part)) for part in ("display", "writer")
    )
    trainer = SimpleNamespace(display=display, writer=writer, stop=SimpleNamespace(received="SIGTERM"))
    progress = Progress()
    assert train._train(trainer, progress, stopped) is progress
    assert closed == ["display", "writer"]


def frozen_model() -> Siglip:
    return tiny_model(torch.float32).requires_grad_(False)


def test_the_folder_is_the_tower_and_all_it_sees(tmp_path: Path) -> None:
    config, model = DataConfig(embedding_dir=str(tmp_path)), frozen_model()
    folder = folder_of(model.vision, config, TRANSFORM, "fp32")
    assert folder.parent == tmp_path
    assert folder_of(frozen_model().vision, config, TRANSFORM, "fp32") == folder
    others = [
        folder_of(model.vision, config, TRANSFORM, "bf16"),
        folder_of(model.vision, config, ImageTransform(16, 8, "bicubic"), "fp32"),
    ]
    model.vision.patch_embedding.bias[0] += 1e-3
    others.append(folder_of(model.vision, config, TRANSFORM, "fp32"))
    assert len({folder, *others}) == 4
    assert folder_of(model.vision, DataConfig(), TRANSFORM, "fp32") is None


def test_a_tower_that_is_not_locked_is_refused_in_a_line(tmp_path: Path) -> None:
    config, model = DataConfig(embedding_dir=str(tmp_path)), frozen_model()
    model.vision.pool.probe.requires_grad_(True)
    with pytest.raises(UserError, match=r"1 of \d+ parameters .* such as vision.pool.probe"):
        folder_of(model.vision, config, TRANSFORM, "fp32")
    for augmentation in ({"flip": True}, {"min_crop_area": 0.5}):
        with pytest.raises(ValueError, match="cannot be cropped or mirrored"):
            DataConfig(embedding_dir=str(tmp_path), **augmentation)


def test_adapters_in_the_image_tower_are_refused_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config, model = DataConfig(embedding_dir=str(tmp_path)), tiny_model(torch.float32)
    add_adapters(model, AdapterConfig(pattern=r"text\.encoder\..*\.(query|key|value|out)$"))
    assert folder_of(model.vision, config, TRANSFORM, "fp32") is not None
    model = tiny_model(torch.float32)
    add_adapters(model, AdapterConfig())
    with pytest.raises(UserError, match="adapters change"):
        folder_of(model.vision, config, TRANSFORM, "fp32")
