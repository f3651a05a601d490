import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from siglip_train.data.image_transform import ImageTransform
from siglip_train.distributed.setup import World
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder, Evaluation, check_all, flat_metrics, run_all, write_evaluations
from siglip_train.evals.classification import HeadAccuracy
from siglip_train.evals.linear_probe import LinearProbe
from siglip_train.evals.loader import EvaluationSource
from siglip_train.evals.probes import Probes
from siglip_train.evals.retrieval import Retrieval
from siglip_train.evals.validation_loss import ValidationLoss
from siglip_train.evals.zero_shot import ZeroShotClassification
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from tests.ranks import run_ranks
from tests.tiers import one_in
from tests.waits import waits

BROKEN = 4
USABLE = [index for index in range(11) if index != BROKEN]
TEXTS = [f"text {index}" for index in range(11)]
TRANSFORM = ImageTransform(image_size=16, patch_size=8)


def tokenize(texts: list[str]) -> Tensor:
    """Spell the text in bytes, cut or padded to 12."""
    return torch.tensor([[*text.encode()[:12], *[0] * (12 - len(text.encode()))][:12] for text in texts])


def tiny_model() -> Siglip:
    torch.manual_seed(0)
    size = {"width": 16, "depth": 1, "mlp_dim": 32, "heads": 2}
    vision = VisionConfig(image_size=16, patch_size=8, **size)
    return Siglip(SiglipConfig(vision, TextConfig(context_length=12, vocab_size=256, **size)))


def encoder_on(rank: int = 0, world_size: int = 1, device: str = "cpu", **options) -> Encoder:
    world = World(rank=rank, world_size=world_size, local_rank=rank, device=torch.device(device))
    options = {"batch_size": 3, "model": tiny_model().to(world.device)} | options
    return Encoder(tokenizer=tokenize, transform=TRANSFORM, world=world, **options)


def picture(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Eleven images in two shards, one of them broken."""
    for shard, members in enumerate((range(7), range(7, 11))):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as archive:
            for index in members:
                buffer = io.BytesIO()
                picture(index).save(buffer, "PNG")
                captions = {"captions": {"en": f"text {index}", "de": [f"Wort {index}", f"noch {index}"]}}
                for extension, data in (
                    ("png", buffer.getvalue() if index != BROKEN else b"no image"),
                    ("txt", f"text {index}".encode()),
                    ("cls", str(index % 3).encode()),
                    ("json", json.dumps(captions).encode()),
                ):
                    member = tarfile.TarInfo(f"{index:04d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return str(tmp_path / "*.tar")


def source(shards: str) -> EvaluationSource:
    return EvaluationSource(shards=shards, text="txt", label="cls")


def test_texts_are_embedded_in_order_whatever_the_batch():
    with torch.no_grad():
        expected = tiny_model().encode_text(tokenize(TEXTS))
    for batch_size in (1, 3, 11, 64):
        embeddings = encoder_on(batch_size=batch_size).encode_texts(TEXTS)
        torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)
    assert not embeddings.requires_grad


def test_images_are_embedded_in_data_order_without_bad_ones(shards):
    images = encoder_on().encode_images(source(shards))
    transform = TRANSFORM
    with torch.no_grad():
        expected = tiny_model().encode_image(transform.batch([transform(picture(i)) for i in USABLE]))
    torch.testing.assert_close(images.embeddings, expected, atol=1e-6, rtol=0)
    assert images.labels == [(index % 3,) for index in USABLE]
    assert [captions[0].text for captions in images.captions] == [f"text {index}" for index in USABLE]
    assert [key.rsplit("/", 1)[1] for key in images.keys] == [f"{index:04d}" for index in USABLE]
    assert np.array_equal(np.asarray(images.original(7)), np.asarray(picture(USABLE[7])))
    assert sum(count for cause, count in images.counts.items() if cause.startswith("bad/")) == 1


def test_pooled_outputs_are_what_the_embeddings_are_made_of(shards):
    encoder = encoder_on()
    pooled = encoder.encode_images(source(shards), encoder.pool_images).embeddings
    unit = encoder_on().encode_images(source(shards)).embeddings
    assert not pooled.norm(dim=1).allclose(torch.ones(len(pooled)), atol=0.01)
    torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=1), unit, atol=1e-6, rtol=0)


def test_labels_and_captions_are_there_only_where_asked_for(shards):
    images = encoder_on().encode_images(EvaluationSource(shards=shards, max_samples=2))
    assert images.labels is None
    assert images.captions == [[], []]


def waits_by_number_of_batches(encoder: Encoder, shards: str) -> list[list[str]]:
    """Where encoding waits, of two, three and four batches of images and of texts; loaders read on the host."""
    found = []
    for size in (6, 9, 12):
        with waits(encoder.world.device) as places:
            encoder.encode_images(EvaluationSource(shards=shards, max_samples=size))
            encoder.encode_texts(["text"] * size)
        found.append([place for place in places if place.startswith("base.py")])
    return found


def test_a_batch_that_is_encoded_is_not_waited_for(shards):
    two, three, four = waits_by_number_of_batches(encoder_on(), shards)
    # which rows are real is read three times in a batch, from the host's own memory
    assert len(three) - len(two) == len(four) - len(three) == 3
    assert set(two) == {"base.py encode_images", "base.py encode_texts", "base.py _finite"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_embeddings_and_is_not_waited_for_in_a_batch(shards):
    encoder = encoder_on(device="cuda")
    for found, expected in zip(everything(encoder, shards), everything(encoder_on(), shards), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    two, three, four = waits_by_number_of_batches(encoder, shards)
    assert two == three == four


def everything(encoder: Encoder, shards: str) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder.encode_images(source(shards)).embeddings, encoder.encode_texts(TEXTS)


def results_on_rank(rank: int, world_size: int, shards: str) -> list:
    """Everything an encoder gives, and how many forward calls the towers saw."""
    encoder = encoder_on(rank, world_size, batch_size=2)
    calls = {"vision": 0, "text": 0, "batches": 0}
    encoder.on_batch = lambda: calls.update(batches=calls["batches"] + 1)
    for name, tower in (("vision", encoder.model.vision), ("text", encoder.model.text)):
        tower.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    images = encoder.encode_images(source(shards))
    texts, two = encoder.encode_texts(TEXTS), encoder.encode_texts(TEXTS[:2])
    names = ["red", "green", "blue"]
    tasks = {
        "classes": ZeroShotClassification(
            shards=shards, classnames=names, templates=["a {}"], group="json:captions.en", bootstrap=20
        ),
        "retrieval": Retrieval(shards=shards, text="json:captions", bootstrap=20),
        "loss": ValidationLoss(shards=shards, reference_batch=3),
        "probes": Probes(
            train={"shards": shards, "select": {"keys": "[0-6]$"}},
            test={"shards": shards, "select": {"keys": "[789]$"}},
            methods={"linear": LinearProbe(l2=[1.0, 0.1])},
            bootstrap=20,
        ),
    }
    evaluations = run_all(tasks, encoder)
    with_details = sorted(task for task, evaluation in evaluations.items() if evaluation.details)
    labels = [label for (label,) in images.labels]
    return [
        images.embeddings,
        texts,
        two,
        labels,
        images.counts,
        calls,
        flat_metrics(evaluations),
        with_details,
    ]


def one_rank_of_several(world_size: int, shards: str) -> list:
    return results_on_rank(torch.distributed.get_rank(), world_size, shards)


@pytest.mark.dist
@pytest.mark.parametrize("world_size", one_in(2, [3, 2]))
def test_any_number_of_ranks_gives_every_rank_the_same(shards, world_size):
    alone = results_on_rank(0, 1, shards)
    ranks = run_ranks(world_size, one_rank_of_several, world_size, shards)
    for rank, together in enumerate(ranks):
        for ours, expected in zip(together[:3], alone[:3], strict=True):
            np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)
        assert together[3:5] == alone[3:5]
        assert together[5] == ranks[0][5], "ZeRO-3 hangs where ranks differ in their number of forward calls"
        assert together[6] == pytest.approx(alone[6], abs=1e-6)
        assert together[7] == (["classes", "loss", "probes", "retrieval"] if rank == 0 else [])
    assert ranks[0][5]["vision"] < alone[5]["vision"], "the work is shared out"


def test_modules_return_to_their_own_modes_even_after_an_error():
    encoder = encoder_on()
    encoder.model.train()
    encoder.model.vision.eval()
    seen = []
    encoder.model.text.register_forward_hook(lambda module, *_: seen.append(module.training))
    encoder.encode_texts(TEXTS)
    assert seen == [False] * 4

    def stop() -> None:
        raise KeyboardInterrupt

    encoder.on_batch = stop
    with pytest.raises(KeyboardInterrupt):
        encoder.encode_texts(TEXTS)
    assert encoder.model.training
    assert all(module.training for module in encoder.model.text.modules())
    assert not any(module.training for module in encoder.model.vision.modules())


def test_bf16_computes_in_bf16_and_returns_fp32(shards):
    exact, rounded = (
        encoder_on(precision=precision).encode_images(source(shards)) for precision in ("fp32", "bf16")
    )
    assert rounded.embeddings.dtype == torch.float32
    # measured 6e-3
    difference = (exact.embeddings - rounded.embeddings).abs().max().item()
    assert 1e-5 < difference < 0.03


def test_embeddings_that_are_not_finite_are_an_error_and_no_perfect_score(shards):
    encoder = encoder_on()
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(UserError, match="images are not finite"):
        encoder.encode_images(source(shards))
    with pytest.raises(UserError, match="texts are not finite"):
        encoder.encode_texts(TEXTS)


def test_scale_and_bias_are_the_models_own_or_what_the_engine_reads():
    encoder = encoder_on()
    assert encoder.scale_and_bias() == pytest.approx((10.0, -10.0))
    encoder.scalar_of = lambda parameter: 0.0 if parameter is encoder.model.logit_scale else -3.0
    assert encoder.scale_and_bias() == (1.0, -3.0)


def test_written_evaluations_are_read_back(tmp_path):
    evaluations = {"a": Evaluation({"acc1": 0.5}, {"text": "ü"}), "b": Evaluation({"de/x": 1.0}, {})}
    assert flat_metrics(evaluations) == {"a/acc1": 0.5, "b/de/x": 1.0}
    write_evaluations(tmp_path / "evaluations", evaluations, step=7)
    files = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    assert files == ["a.json", "b.json"]
    content = json.loads((tmp_path / "evaluations" / "a.json").read_text(encoding="utf-8"))
    assert content == {"task": "a", "step": 7, "metrics": {"acc1": 0.5}, "details": {"text": "ü"}}


def test_tasks_find_their_shards_before_anything_is_embedded(tmp_path):
    (tmp_path / "0.tar").touch()
    for task in (Retrieval, ValidationLoss, HeadAccuracy):
        task(shards=f"{tmp_path}/*.tar").check()
        with pytest.raises(UserError, match=r"tasks\.x: no shard matches nowhere\.tar"):
            check_all({"x": task(shards="nowhere.tar")}, "tasks")
    with pytest.raises(UserError, match=r"nowhere\.tar"):
        Probes(train=f"{tmp_path}/0.tar", test="nowhere.tar").check()


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "", "a\nb"])
def test_a_task_whose_name_leads_out_of_the_folder_of_results_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a task"):
        check_all({name: ValidationLoss(shards="a.tar")}, "tasks")
