"""The objective against a plain restatement of its formula, alone and over ranks."""

import logging

import pytest
import torch
from torch.nn.functional import logsigmoid

from kernels.testing import assert_close, rms_ratio
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.sigmoid import SigmoidLoss, expected_initial_loss, text_ids
from siglip_train.objectives.training_model import TrainingModel
from tests.kernels.test_sigmoid_loss import blocks_by_dtype
from tests.objectives.tiny import tiny_batch, tiny_model
from tests.ranks import run_ranks


def formula(model, batch):
    """Section 3.2 of SigLIP, with the towers' public encoders."""
    images, texts = model.encode_image(batch.part("images")), model.encode_text(batch.part("texts"))
    logits = model.logit_scale.exp() * images @ texts.T + model.logit_bias
    signs = 2 * torch.eye(batch.size, dtype=logits.dtype) - 1
    return -logsigmoid(signs * logits).sum() / batch.size


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_value_and_every_gradient_equal_the_formula():
    batch, model, plain = tiny_batch(7), tiny_model(), tiny_model()
    loss = SigmoidLoss(weight=1.0)(ForwardPass(model, batch))["images"] / batch.size
    expected = formula(plain, batch)
    loss.backward()
    expected.backward()
    assert_close(loss.detach(), expected.detach(), 1e-14)
    compared = 0
    for name, gradient in gradients(plain).items():
        # the bias of the keys is invisible to softmax: its gradient is rounding noise round 0
        if gradient.abs().max() > 1e-12:
            assert_close(gradients(model)[name], gradient, 1e-11, name)
            compared += 1
    assert compared >= len(gradients(model)) - 3


@pytest.mark.parametrize(
    ("key", "autocast", "used"),
    [("auto", False, torch.float32), ("auto", True, torch.float16), ("bf16", False, torch.bfloat16),
     ("fp32", True, torch.float32)],
)  # fmt: skip
def test_products_have_the_dtype_that_the_key_names(key, autocast, used):
    objective = SigmoidLoss(compute_dtype=key)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), blocks_by_dtype() as dtypes:
        objective(ForwardPass(tiny_model(torch.float32), tiny_batch(4, torch.float32)))
    assert dtypes == [used]


def test_another_dtype_of_products_is_refused():
    with pytest.raises(ValueError, match="compute_dtype is 'fp8': choose auto, fp16, bf16, fp32"):
        SigmoidLoss(compute_dtype="fp8")


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_pairs_of_equal_texts_count_as_told(weight):
    batch, model = tiny_batch(6), tiny_model()
    batch.parts["texts"] = batch.part("texts")[[0, 1, 0, 2, 1, 0]]
    images, texts = model.encode_image(batch.part("images")), model.encode_text(batch.part("texts"))
    logits = model.logit_scale.exp() * images @ texts.T + model.logit_bias
    signs = 2 * torch.eye(6, dtype=logits.dtype) - 1
    alike = (batch.part("texts")[:, None] == batch.part("texts")).all(2) & (signs < 0)
    assert alike.sum() == 8
    expected = -(logsigmoid(signs * logits) * torch.where(alike, weight, 1.0)).sum() / 6
    loss = SigmoidLoss(same_text_weight=weight)(ForwardPass(model, batch))["images"] / batch.size
    assert_close(loss.detach(), expected.detach(), 1e-14)


def test_ids_of_texts_tell_order_place_and_token_apart():
    tokens = torch.randint(0, 1 << 18, (5000, 7))
    tokens[1], tokens[2], tokens[3] = tokens[0].roll(1), tokens[0].flip(0), tokens[0]
    tokens[4], tokens[5] = torch.tensor([0, 0, 0, 0, 0, 0, 1]), 0
    ids = text_ids(tokens)
    assert ids.min() >= 0
    assert ids[0] == ids[3]
    assert len(ids.unique()) == len(tokens.unique(dim=0)) == 4999


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), "half"])
def test_a_weight_of_equal_texts_that_cannot_be(weight):
    with pytest.raises(ValueError, match="same_text_weight"):
        SigmoidLoss(same_text_weight=weight)


def test_expected_initial_loss():
    # recipe: about 10.0 for the own text and 1.49 for the others at a batch of 32768
    assert expected_initial_loss(32768) == pytest.approx(11.49, abs=0.005)
    # orthogonal embeddings have exactly these logits
    embeddings = torch.eye(16, dtype=torch.float64)
    logits = 10 * embeddings[:8] @ embeddings[8:].T - 10
    exact = -logsigmoid((2 * torch.eye(8, dtype=torch.float64) - 1) * logits).sum() / 8
    assert expected_initial_loss(8) == pytest.approx(exact.item(), rel=1e-12)
    assert expected_initial_loss(2, bias=800.0) == pytest.approx(800.0)


WITHOUT_TEXT = [1, 4, 5, 6]  # of 8: one of the first rank's, three of the second's


def partly_captioned():
    """Eight samples, half of them with a text, and these alone."""
    batch = tiny_batch(8)
    batch.parts["texts"][3] = batch.part("texts")[0]
    has_text = torch.ones(8, dtype=torch.bool)
    has_text[WITHOUT_TEXT] = False
    return batch._replace(parts={**batch.parts, "has_text": has_text}), batch.each(
        lambda part: part[has_text]
    )


@pytest.mark.parametrize("options", [{}, {"same_text_weight": 0.25}])
def test_samples_without_a_text_take_no_part(options):
    batch, captioned = partly_captioned()
    model, plain = TrainingModel(tiny_model(), {"s": SigmoidLoss(**options)}), tiny_model()
    assert model.counts(batch) == {"s/images": 4}
    loss = model(batch).total
    expected = SigmoidLoss(**options)(ForwardPass(plain, captioned))["images"] / 4
    loss.backward()
    expected.backward()
    # measured 2e-15
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, gradient in gradients(plain).items():
        if gradient.abs().max() > 1e-12:
            assert_close(gradients(model.model)[name], gradient, 1e-11, name)

    # none at all: nothing to learn, and nothing that was rounded off
    batch.parts["has_text"][:] = False
    model.zero_grad()
    losses = model(batch)
    losses.total.backward()
    assert losses.total.item() == 0
    assert not any(gradient.any() for gradient in gradients(model.model).values() if gradient is not None)


def one_rank_partly_captioned(exchange):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = TrainingModel(tiny_model(), {"sigmoid": SigmoidLoss(exchange=exchange)})
    # as the loop has it: of the global batch, over the number of ranks
    losses = model(share(partly_captioned()[0], rank, size), {"sigmoid/images": torch.tensor(4 / size)})
    return mean_over_ranks(model, losses)


def mean_over_ranks(model, losses):
    """The loss and the gradients of the global batch, as the engine takes their means."""
    size = torch.distributed.get_world_size()
    losses.total.backward()
    for parameter in model.parameters():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= size
    total = losses.total.detach()
    torch.distributed.all_reduce(total)
    return total / size, gradients(model.model)


@pytest.mark.dist
@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_ranks_with_unlike_numbers_of_texts_equal_the_captioned_batch(exchange):
    model = tiny_model()
    loss = formula(model, partly_captioned()[1])
    loss.backward()
    for total, found in run_ranks(2, one_rank_partly_captioned, exchange):
        assert total == pytest.approx(loss.item(), rel=1e-12)
        for name, expected in gradients(model).items():
            if expected.abs().max() > 1e-12:
                assert rms_ratio(torch.from_numpy(found[name]), expected) < 1e-11, name


def share(batch, rank, size):
    rows = slice(rank * batch.size // size, (rank + 1) * batch.size // size)
    return batch.rows(rows)


def one_rank(exchange):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with pytest.raises(ValueError, match="a grid of 3 x 1 has 3 ranks, the group has 2"):
        SigmoidLoss(exchange="grid:3x1")
    model = TrainingModel(tiny_model(), {"sigmoid": SigmoidLoss(weight=1.0, exchange=exchange)})
    said, logger = [], logging.getLogger("siglip_train.distributed.ring")
    logger.setLevel(logging.INFO)
    logger.addFilter(lambda record: said.append(record.getMessage()))
    with torch.no_grad():
        model(share(tiny_batch(8), rank, size))
    losses = model(share(tiny_batch(8), rank, size))
    assert said == ["exchange of texts between ranks: grid:1x2"]
    return mean_over_ranks(model, losses)


@pytest.mark.dist
def test_two_ranks_averaged_equal_the_whole_batch():
    # one form: kernels' own tests have them all
    model = tiny_model()
    loss = formula(model, tiny_batch(8))
    loss.backward()
    for total, found in run_ranks(2, one_rank, "grid:1x2"):
        assert total == pytest.approx(loss.item(), rel=1e-12)
        for name, expected in gradients(model).items():
            if expected.abs().max() > 1e-12:
                assert rms_ratio(torch.from_numpy(found[name]), expected) < 1e-11, name
