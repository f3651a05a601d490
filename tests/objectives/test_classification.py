"""The classification head: its formula, transformers' form of it, and labels that cannot be."""

from pathlib import Path

import pytest
import torch

from siglip_train.batch import Batch, Images
from siglip_train.errors import UserError
from siglip_train.interop.huggingface import read_huggingface
from siglip_train.models.siglip import Siglip
from siglip_train.models.vision import patchify
from siglip_train.objectives.classification import Classification
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.training_model import TrainingModel
from tests.objectives.tiny import tiny_batch, tiny_model


def labelled(labels: list[int]) -> Batch:
    batch = tiny_batch(len(labels), torch.float32)
    keys = tuple(f"00000.tar/{row}" for row in range(len(labels)))
    return Batch({"images": batch.part("images"), "labels": torch.tensor(labels)}, keys)


def drawn(**options) -> Classification:
    objective = Classification(classes=3, width=16, **options)
    torch.nn.init.normal_(objective.classifier.weight)
    torch.nn.init.normal_(objective.classifier.bias)
    return objective


@pytest.mark.parametrize("features", ["tokens", "pooled"])
def test_the_loss_is_cross_entropy_with_smoothed_targets(features):
    model, batch = tiny_model(torch.float32), labelled([2, 0, 1, 1])
    objective = drawn(features=features, label_smoothing=0.3)
    loss = objective(ForwardPass(model, batch))["images"] / batch.size
    image = model.vision(*batch.part("images"))
    x = (image.tokens.sum(1) / 4 if features == "tokens" else image.pooled).double()
    logits = x @ objective.classifier.weight.double().T + objective.classifier.bias.double()
    log_shares = logits - logits.exp().sum(1, keepdim=True).log()
    target = torch.full((4, 3), 0.1).double()
    target[range(4), [2, 0, 1, 1]] += 0.7
    assert loss.item() == pytest.approx(-(target * log_shares).sum(1).mean().item(), rel=1e-6)


def test_a_fresh_head_finds_all_classes_equally_likely_and_the_text_tower_is_not_run():
    model = tiny_model(torch.float32)
    model.text.register_forward_hook(lambda *_: pytest.fail("nothing needs texts"))
    losses = TrainingModel(model, {"classes": Classification(classes=3, width=16)})(labelled([0, 2]))
    assert losses.total.item() == pytest.approx(1.0986123, rel=1e-6)


def test_padding_is_not_averaged():
    model, batch = tiny_model(torch.float32), labelled([0, 1])
    patches, grid, _ = batch.part("images")
    images = Images(patches[:, :2], grid[:, :2], torch.ones(2, 2).bool())
    short = ForwardPass(model, Batch({"images": images}))
    mask = torch.tensor([[True, True, False, False]] * 2)
    padded_grid = grid * mask[..., None]
    padded = ForwardPass(model, Batch({"images": Images(patches, padded_grid, mask)}))
    torch.testing.assert_close(padded.image_average, short.image_average)


def test_logits_are_those_of_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        text_config={**tower, "vocab_size": 23, "max_position_embeddings": 5, "projection_size": 16},
    )
    torch.manual_seed(0)
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    theirs = transformers.SiglipForImageClassification.from_pretrained(tmp_path, num_labels=3).eval()
    torch.nn.init.normal_(theirs.classifier.weight)
    files = read_huggingface(tmp_path)
    ours = Siglip(files.description.config)
    ours.load_state_dict(files.state)
    objective = Classification(classes=3, width=16)
    objective.classifier.load_state_dict(theirs.classifier.state_dict())
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1
    batch = Batch({"images": patchify(pixels, 8)})
    with torch.no_grad():
        expected = theirs(pixel_values=pixels).logits
        found = objective.logits(ForwardPass(ours, batch))
    assert expected.abs().max() > 0.1
    # 6e-8 is what they differ by here
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_labels_that_cannot_be_are_named():
    objective = Classification(classes=3, width=16)
    for labels, wrong in (([0, 3, 1], 3), ([0, -1, 7], -1)):
        with pytest.raises(
            UserError, match=rf"label {wrong} of sample 00000.tar/1: .* 3 classes, so labels are 0..2"
        ):
            objective.counts(labelled(labels))


def test_an_objective_that_asks_for_what_it_did_not_name_is_told_so():
    with pytest.raises(
        UserError, match=r"asks for the texts of a batch, which holds images, labels: .*`inputs`"
    ):
        _ = ForwardPass(tiny_model(torch.float32), labelled([0])).text_embedding


@pytest.mark.parametrize(
    "wrong", [{"classes": 1}, {"features": "cls"}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Classification(**{"classes": 3, "width": 16, **wrong})
