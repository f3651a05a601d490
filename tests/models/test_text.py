"""The text tower: no mask of any kind, last position, head."""

import pytest
import torch

from siglip_train.errors import UserError
from siglip_train.models.text import TextConfig, TextTower, with_full_table
from tests.models.small import CONTEXT, small_model, some_tokens

SIZES = {"context_length": 5, "vocab_size": 19, "width": 16, "depth": 1, "mlp_dim": 20, "heads": 2}


def test_pooled_is_the_head_of_the_last_position() -> None:
    tower = small_model().text
    features = tower(some_tokens())
    assert features.tokens.shape == (3, CONTEXT, 16)
    torch.testing.assert_close(features.pooled, tower.head(features.tokens[:, -1]))


def test_every_position_reads_every_other() -> None:
    tower = small_model().text
    tokens = some_tokens(1)
    before = tower(tokens).tokens
    for changed in range(CONTEXT):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 19
        moved = (tower(other).tokens - before).abs().amax(-1)[0]
        assert (moved > 1e-6).all(), f"position {changed} is not seen by all"


def test_encoder_sees_embedding_plus_position() -> None:
    tower = small_model().text
    tokens = some_tokens()
    entered = tower.token_embedding(tokens) + tower.position_table
    torch.testing.assert_close(tower(tokens).tokens, tower.encoder(entered))


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT + 1])
def test_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens, the model takes {CONTEXT}"):
        small_model().text(torch.zeros(1, length, dtype=torch.int64))


def test_without_projection_the_pooled_vector_is_the_embedding() -> None:
    tower = TextTower(TextConfig(**SIZES, projection=False), embedding_dim=16)
    features = tower(some_tokens())
    assert torch.equal(features.pooled, features.tokens[:, -1])
    assert not any("head" in name for name, _ in tower.named_parameters())


def test_without_projection_widths_must_agree() -> None:
    with pytest.raises(UserError, match="16 must equal"):
        TextTower(TextConfig(**SIZES, projection=False), embedding_dim=24)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match=r"model\.text"):
        TextConfig(**SIZES | {"heads": 3})


def test_a_bottleneck_is_the_tower_with_the_product_of_both_factors_as_its_table() -> None:
    torch.manual_seed(0)
    narrow = TextTower(TextConfig(**SIZES, bottleneck=3), 24).double()
    tokens = some_tokens()
    state = {f"text.{name}": tensor for name, tensor in narrow.state_dict().items()}
    config, full = with_full_table(narrow.config, state)
    assert config == TextConfig(**SIZES)
    wide = TextTower(config, 24).double()
    wide.load_state_dict({name.removeprefix("text."): tensor for name, tensor in full.items()})
    torch.testing.assert_close(narrow(tokens).pooled, wide(tokens).pooled, rtol=1e-12, atol=1e-12)

    # the gradients of the factors are those of the table by the chain rule
    for tower in (narrow, wide):
        tower(tokens).pooled.square().sum().backward()
    table = wide.token_embedding.weight.grad
    torch.testing.assert_close(narrow.token_embedding.weight.grad, table @ narrow.token_projection.weight)
    torch.testing.assert_close(narrow.token_projection.weight.grad, table.T @ narrow.token_embedding.weight)


def test_a_bottleneck_saves_parameters_and_starts_with_the_variance_of_a_full_table() -> None:
    sizes = SIZES | {"vocab_size": 4000, "width": 64}
    torch.manual_seed(0)
    wide, narrow = (TextTower(TextConfig(**sizes, bottleneck=each), 24) for each in (None, 16))
    saved = sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in narrow.parameters())
    assert saved == 4000 * (64 - 16) - 64 * 16
    embedded = narrow.token_projection(narrow.token_embedding.weight)
    assert embedded.std().item() == pytest.approx(wide.token_embedding.weight.std().item(), rel=0.1)


def test_a_full_table_has_nothing_to_widen() -> None:
    state = small_model().state_dict()
    config, same = with_full_table(small_model().config.text, state)
    assert config == small_model().config.text
    assert same.keys() == state.keys()
