"""What a vision-language model takes of the vision tower: tokens of any layer, from which a projector learns."""

import pytest
import torch
from torch import nn

from siglip_train.errors import UserError
from siglip_train.interop.conversion import Request, convert
from siglip_train.interop.native import Description, write_export
from siglip_train.models.vision import VisionTower, patchify
from tests.models.small import small_config, small_model

LANGUAGE_WIDTH, WORDS = 20, 3


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """The exported tower, opened by transformers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tower")
    write_export(folder / "n", small_model().state_dict(), Description(small_config()))
    convert(folder / "n", folder / "hf", Request("hf", part="vision"))
    return transformers.SiglipVisionModel.from_pretrained(folder / "hf")


@torch.no_grad()
def test_every_layer_equals_transformers(tower: nn.Module) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    theirs = tower(pixels, output_hidden_states=True).hidden_states
    ours, images = small_model().vision, patchify(pixels, 4)
    assert len(theirs) == 3
    for layer in range(-3, 3):
        torch.testing.assert_close(ours.layer_tokens(images, layer), theirs[layer], rtol=0, atol=2e-6)
    normed = ours.encoder.norm(ours.layer_tokens(images, -1))
    torch.testing.assert_close(normed, ours(*images).tokens)


def test_layers_that_are_not_there_are_refused() -> None:
    images = patchify(torch.zeros(1, 3, 16, 16), 4)
    for vision, layer in ((small_model().vision, 3), (small_model().vision, -4)):
        with pytest.raises(UserError, match=f"layer {layer} cannot be taken of a tower of 2 blocks"):
            vision.layer_tokens(images, layer)
    with pytest.raises(UserError, match="pool cls"):
        VisionTower(small_config(pool="cls").vision).layer_tokens(images, -1)


def last_loss(tower: nn.Module, *, shuffled: bool) -> float:
    """LLaVA in small: the tower frozen, an MLP to the width of a language model, which names the colour it is shown."""
    torch.manual_seed(0)
    projector = nn.Sequential(
        nn.Linear(24, LANGUAGE_WIDTH), nn.GELU(), nn.Linear(LANGUAGE_WIDTH, LANGUAGE_WIDTH)
    )
    language = nn.TransformerEncoderLayer(
        LANGUAGE_WIDTH, 2, 40, dropout=0.0, batch_first=True, norm_first=True
    )
    prompt, words = torch.randn(1, 1, LANGUAGE_WIDTH), nn.Linear(LANGUAGE_WIDTH, WORDS)
    modules = nn.ModuleList([projector, language, words])
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-2)
    colours = torch.eye(WORDS) * 2 - 1
    losses = []
    for _ in range(80):
        labels = torch.randint(WORDS, (24,))
        pixels = colours[labels][:, :, None, None] + torch.randn(24, 3, 16, 16) / 10
        with torch.no_grad():
            tokens = tower(pixels, output_hidden_states=True).hidden_states[-2]  # [B, L, D]
        if shuffled:
            tokens = tokens[torch.randperm(24)]
        sequence = torch.cat([projector(tokens), prompt.expand(24, -1, -1)], dim=1)
        loss = nn.functional.cross_entropy(words(language(sequence)[:, -1]), labels)
        optimizer.zero_grad()
        loss.backward()
        assert projector[0].weight.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


def test_a_projector_trains_on_the_exported_tower(tower: nn.Module) -> None:
    assert last_loss(tower, shuffled=False) < 0.2
    # tokens of other images say nothing, log 3 = 1.10
    assert last_loss(tower, shuffled=True) > 0.9
