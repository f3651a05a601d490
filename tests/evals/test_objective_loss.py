import io
import tarfile

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from siglip_train.errors import UserError
from siglip_train.evals.objective_loss import ObjectiveLoss
from siglip_train.evals.validation_loss import ValidationLoss
from siglip_train.objectives.classification import Classification
from tests.engine import test_engine as whole
from tests.evals.test_base import encoder_on, picture
from tests.objectives.test_lifecycle import Scored, deepspeed_engine, training_model
from tests.ranks import run_ranks

SAMPLES = 10


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("held_out") / "00000.tar"
    with tarfile.open(path, "w") as archive:
        for index in range(SAMPLES):
            image = io.BytesIO()
            picture(index).save(image, "PNG")
            for extension, data in (
                ("png", image.getvalue()),
                ("txt", f"{index} words".encode()),
                ("cls", str(index % 3).encode()),
            ):
                member = tarfile.TarInfo(f"{index:04d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return str(path)


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[byte % 31 for byte in text.encode()[:5]] for text in texts])


def measured(model, shards: str, rank: int = 0, world_size: int = 1, **options) -> dict[str, float]:
    encoder = encoder_on(rank, world_size, model=model.model, heads=dict(model.objectives.items()), **options)
    encoder.tokenizer = tokenize
    found = {}
    for name in model.objectives:
        task = ObjectiveLoss(shards=shards, objective=name, text="txt", reference_batch=4)
        task.check()
        found.update({f"{name}/{key}": value for key, value in task.run(encoder).metrics.items()})
    return found


def on_a_rank(stage: int, shards: str) -> dict[str, float]:
    engine = deepspeed_engine(training_model(), stage)
    before = [module.training for module in engine.module.modules()]
    found = measured(engine.module, shards, dist.get_rank(), dist.get_world_size(), whole=engine)
    assert [module.training for module in engine.module.modules()] == before
    engine.destroy()
    return found


@pytest.mark.dist
def test_two_ranks_at_stage_3_measure_what_one_process_does(shards: str) -> None:
    model = training_model()
    model.objectives["scored"].average[0] = 0.0
    expected = measured(model, shards)
    assert set(expected) == {"sigmoid/loss", "scored/loss", "scored/even_loss", "scored/all_loss"}
    # a sum of tasks by their weights
    assert expected["scored/loss"] == pytest.approx(
        2 * expected["scored/even_loss"] + expected["scored/all_loss"]
    )
    for found in run_ranks(2, on_a_rank, 3, shards):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_sigmoid_objective_has_the_validation_loss_and_a_classifier_its_cross_entropy(
    shards: str,
) -> None:
    encoder = encoder_on(heads={"labels": Classification(classes=3, width=16)})
    head = encoder.heads["labels"]
    torch.nn.init.normal_(head.classifier.weight)
    task = ObjectiveLoss(shards=shards, objective="labels", label="cls", reference_batch=5)
    logits = encoder.encode_images(
        ValidationLoss(shards=shards)._source,
        lambda images: head.classifier(encoder.model.vision(*images).tokens.mean(dim=1)),
    ).embeddings
    expected = functional.cross_entropy(logits, torch.arange(SAMPLES) % 3)
    evaluation = task.run(encoder)
    assert evaluation.metrics["loss"] == pytest.approx(expected.item(), rel=1e-2)
    assert evaluation.details == {"counts": {"seen": SAMPLES}}

    model = training_model()
    encoder = encoder_on(model=model.model, heads=dict(model.objectives.items()))
    encoder.tokenizer = tokenize
    same = ValidationLoss(shards=shards, reference_batch=5).run(encoder).metrics["loss"]
    task = ObjectiveLoss(shards=shards, objective="sigmoid", text="txt", reference_batch=5)
    assert task.run(encoder).metrics["loss"] == pytest.approx(same, rel=1e-3)


def test_an_objective_that_is_not_there_and_an_input_without_a_place_are_errors(shards: str) -> None:
    encoder = encoder_on(heads={"scored": Scored()})
    with pytest.raises(UserError, match="no objective 'sigmoid' to measure; there are: scored"):
        ObjectiveLoss(shards=shards, objective="sigmoid").run(encoder)
    with pytest.raises(UserError, match="text is null"):
        ObjectiveLoss(shards=shards, objective="scored").run(encoder)
    with pytest.raises(ValueError, match="at least 1"):
        ObjectiveLoss(shards=shards, objective="scored", reference_batch=0)
    assert whole.CONFIG.vision.image_size == encoder.transform.image_size
