"""The whole model: embeddings, initial values, gradients, precision, cost."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from siglip_train.models.flops import flops_per_pair, passes
from siglip_train.models.layers import initialize
from siglip_train.models.siglip import Siglip, normalize
from siglip_train.models.vision import patchify
from tests.models.small import padded, rectangle, small_config, small_model, some_pixels, some_tokens

POOLS = ["map", "cls", "average"]


def test_embeddings_are_normalised_pooled_features() -> None:
    model = small_model()
    image, text = model.encode_image(some_pixels()), model.encode_text(some_tokens())
    assert image.shape == text.shape == (3, 24)
    pooled = model.vision(*patchify(some_pixels(), 4)).pooled
    torch.testing.assert_close(image, pooled / (pooled.norm(dim=-1, keepdim=True) + 1e-8))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    assert torch.equal(image, model.encode_image(patchify(some_pixels(), 4)))


def test_normalize_adds_its_epsilon_to_the_norm() -> None:
    vector = torch.tensor([[3e-8, 4e-8], [0.0, 0.0]])
    expected = torch.tensor([[0.5, 4 / 6], [0.0, 0.0]])
    torch.testing.assert_close(normalize(vector), expected)
    assert normalize(vector.bfloat16()).dtype == torch.float32
    assert normalize(vector.double()).dtype == torch.float64


def test_pixels_of_another_form_are_refused() -> None:
    for pixels in (
        torch.zeros(3, 16, 16),
        torch.zeros(1, 16, 16, 3),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
            small_model().encode_image(pixels)


def test_logit_parameters_begin_at_log_10_and_minus_10() -> None:
    model = small_model()
    assert model.logit_scale.shape == model.logit_bias.shape == (1,)
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_is_initialised(pool: str) -> None:
    model = small_model(pool=pool)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    initialize(model)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name


def test_initialize_draws_what_construction_draws() -> None:
    built = small_model()
    again = Siglip(small_config())
    initialize(again, torch.Generator().manual_seed(5))
    other = Siglip(small_config())
    initialize(other, torch.Generator().manual_seed(5))
    for (name, one), two, three in zip(
        built.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(two, three), name
        if one.std(correction=0) > 1e-3:
            assert two.std().item() == pytest.approx(one.std().item(), rel=0.5), name


def test_initial_embeddings_and_positions_have_unit_norm_on_average() -> None:
    torch.manual_seed(0)
    config = small_config(image_size=64)
    config.text.vocab_size = 2000
    model = Siglip(config)
    for table in (model.vision.position_table, model.text.token_embedding.weight):
        assert table.std().item() == pytest.approx(1 / math.sqrt(table.shape[-1]), rel=0.05)
    assert model.text.position_table.std().item() == pytest.approx(1 / 4, rel=0.3)
    # lecun-normal stem and head: the variance of an input is kept
    assert model.vision.patch_embedding.weight.std().item() == pytest.approx(1 / math.sqrt(48), rel=0.1)
    assert model.text.head.weight.std().item() == pytest.approx(1 / 4, rel=0.2)


@pytest.mark.parametrize("pool", POOLS)
def test_gradients_reach_every_parameter(pool: str) -> None:
    model = small_model(pool=pool).double()
    image = model.encode_image(
        padded(rectangle(3, 3, 4), 16)._replace(patches=torch.randn(3, 16, 48).double())
    )
    text = model.encode_text(some_tokens())
    logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
    signs = 2 * torch.eye(3, dtype=torch.float64) - 1
    (-torch.nn.functional.logsigmoid(signs * logits).sum() / 3).backward()
    for name, parameter in model.named_parameters():
        # a key bias moves all scores of a query alike, which softmax does not see
        if not name.endswith("key.bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_autocast_keeps_embeddings_in_fp32_and_close() -> None:
    model = small_model()
    exact = model.encode_image(some_pixels()), model.encode_text(some_tokens())
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.encode_image(some_pixels()), model.encode_text(some_tokens())
    for low, high in zip(cast, exact, strict=True):
        assert low.dtype == torch.float32
        # measured 5e-3; goldens/README.md: 1e-2 for trained-like weights
        torch.testing.assert_close(low, high, rtol=0, atol=2e-2)


def test_builds_and_initialises_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Siglip(small_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    initialize(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("pool", POOLS)
def test_flops_are_those_torch_counts(pool: str) -> None:
    model = small_model(pool=pool)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (model.encode_image(some_pixels(2)).sum() + model.encode_text(some_tokens(2)).sum()).backward()
    # positions are resampled once a batch, forward and for the table's gradient
    positions = 2 * 2 * 16 * 16 * 24
    assert (counter.get_total_flops() - positions) / 2 == flops_per_pair(small_config(pool=pool))


def test_a_locked_tower_costs_its_forward_pass_and_adapters_spare_the_gradients_of_weights() -> None:
    model, config = small_model(), small_config()
    assert passes(model.vision) == 3
    model.vision.requires_grad_(requires_grad=False)
    assert passes(model.vision) == 1
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            model.encode_image(some_pixels(2))
        model.encode_text(some_tokens(2)).sum().backward()
    positions = 2 * 16 * 16 * 24
    assert (counter.get_total_flops() - positions) / 2 == flops_per_pair(config, vision_passes=1)
    without_texts = flops_per_pair(config, vision_passes=1, text_passes=0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_image(some_pixels(2))
    assert (counter.get_total_flops() - positions) / 2 == without_texts
    model.vision.pool.probe.requires_grad = True
    assert 2 < passes(model.vision) < 2.01


def test_flops_of_another_number_of_tokens() -> None:
    assert flops_per_pair(small_config(), tokens=16) == flops_per_pair(small_config())
    assert flops_per_pair(small_config(), tokens=36) == flops_per_pair(small_config(image_size=24))
