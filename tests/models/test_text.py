"""The text tower: no mask of any kind, last position, head."""

import pytest
import torch

from siglip_train.errors import UserError
from siglip_train.models.text import TextConfig, TextTower
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
