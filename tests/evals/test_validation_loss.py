import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from siglip_train.errors import UserError
from siglip_train.evals.loader import Caption
from siglip_train.evals.validation_loss import ValidationLoss
from tests.evals.fakes import FakeEncoder, image_set


def pairs(count, width=8):
    generator = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(count, width, generator=generator), dim=-1) for _ in range(2))
    captions = [[Caption("en", f"en {row}"), Caption("de", f"de {row}")] for row in range(count)]
    words = {f"en {row}": texts[row] for row in range(count)} | {
        f"de {row}": images[row] for row in range(count)
    }
    return images, texts, FakeEncoder(image_set(images, captions), words)


def plain_loss(images, texts):
    """The definition, in double precision: sum over all pairs, mean over images."""
    logits = 10.0 * images.double() @ texts.double().T - 10.0
    signs = 2 * torch.eye(len(images), dtype=torch.float64) - 1
    losses = -logsigmoid(signs * logits)
    return losses.sum().item() / len(images), losses.diagonal().mean().item()


def test_blocks_of_the_reference_batch_in_data_order_without_the_remainder():
    images, texts, encoder = pairs(23)
    metrics, details = ValidationLoss(shards="x.tar", reference_batch=5).run(encoder)
    blocks = [plain_loss(images[i : i + 5], texts[i : i + 5]) for i in range(0, 20, 5)]
    loss, positive = (sum(part) / 4 for part in zip(*blocks, strict=True))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["positive_loss"] == pytest.approx(positive, rel=1e-5)
    assert metrics["negative_loss"] == pytest.approx(loss - positive, rel=1e-4)
    assert details["counts"] == {"seen": 23}


def test_language_chooses_the_caption():
    images, _, encoder = pairs(10)
    metrics, _ = ValidationLoss(shards="x.tar", reference_batch=10, language="de").run(encoder)
    assert metrics["loss"] == pytest.approx(plain_loss(images, images)[0], rel=1e-5)


def test_fewer_pairs_than_a_block_are_one_and_that_is_said(caplog):
    images, texts, encoder = pairs(4)
    metrics, _ = ValidationLoss(shards="x.tar", reference_batch=5).run(encoder)
    assert metrics["loss"] == pytest.approx(plain_loss(images, texts)[0], rel=1e-5)
    assert "x.tar holds 4 pairs, fewer than reference_batch=5: the loss is taken among these" in caplog.text


def test_no_pair_is_an_error():
    _, _, encoder = pairs(4)
    with pytest.raises(UserError, match="in language 'fr'"):
        ValidationLoss(shards="x.tar", reference_batch=2, language="fr").run(encoder)
    with pytest.raises(ValueError, match="reference_batch must be at least 1"):
        ValidationLoss(shards="x.tar", reference_batch=0)
