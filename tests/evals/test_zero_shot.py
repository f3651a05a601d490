import json

import numpy as np
import pytest
import torch

from siglip_train.errors import UserError
from siglip_train.evals.zero_shot import ZeroShotClassification, class_embeddings, classification_metrics
from tests.evals.fakes import FakeEncoder, image_set
from tests.evals.goldens import load_goldens


def test_class_embeddings_equal_those_of_open_clip_and_big_vision():
    _, expected = load_goldens()
    prompts = torch.from_numpy(expected["zs/prompt_embeddings_normalized"])
    # any positive factor on a prompt must not matter
    ours = class_embeddings(prompts * torch.rand(13, 7, 1).add(0.5)).numpy()
    np.testing.assert_allclose(ours, expected["zs/open_clip_classifier"].T, atol=1e-6)
    np.testing.assert_allclose(ours, expected["zs/big_vision_class_embeddings"], atol=1e-6)


def test_accuracies_equal_a_plain_count():
    random = np.random.default_rng(1)
    images, classes = random.normal(size=(200, 6)), random.normal(size=(11, 6))
    labels = random.integers(0, 9, 200)  # classes 9 and 10 never occur
    order = (-(images @ classes.T)).argsort(axis=1)
    metrics = classification_metrics(*(torch.from_numpy(part) for part in (images, classes, labels)))
    assert metrics["acc1"] == pytest.approx((order[:, 0] == labels).mean())
    assert metrics["acc5"] == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())
    recalls = [(order[labels == c, 0] == c).mean() for c in range(9)]
    assert metrics["mean_per_class_recall"] == pytest.approx(np.mean(recalls))


def test_fewer_than_five_classes_have_no_acc5():
    metrics = classification_metrics(torch.eye(3), torch.eye(3), torch.arange(3))
    assert metrics == {"acc1": 1.0, "mean_per_class_recall": 1.0}


NAMES = ["red fox", "Blue_Whale", "hen"]


def encoder_with(labels, prompts=("a {}", "the {}")):
    eye = torch.eye(3)
    texts = {prompt.replace("{}", name): eye[row] for row, name in enumerate(NAMES) for prompt in prompts}
    texts |= {text.lower().replace("_", " "): value for text, value in texts.items()}
    images = eye[[0, 1, 2, 2]]
    return FakeEncoder(image_set(images, [[] for _ in images], labels), texts)


def test_task_prompts_every_class_with_every_template():
    encoder = encoder_with([0, 1, 2, 1])
    task = ZeroShotClassification(shards="x.tar", classnames=NAMES, templates=["a {c}", "the {}"])
    metrics, details = task.run(encoder)
    assert encoder.asked == ["a red fox", "the red fox", "a Blue_Whale", "the Blue_Whale", "a hen", "the hen"]
    assert metrics == {"acc1": 0.75, "mean_per_class_recall": pytest.approx(2.5 / 3), "n": 4.0}
    assert (encoder.source.label, encoder.source.text) == ("cls", None)
    json.dumps(details)
    assert details["confusions"] == [{"label": "Blue_Whale", "predicted": "hen", "images": 1}]
    assert details["classes"][1] == {"name": "Blue_Whale", "images": 2, "recall": 0.5}
    (mistake,) = details["mistakes"]
    assert (mistake["key"], mistake["label"], mistake["predicted"]) == ("00000.tar/3", "Blue_Whale", "hen")
    assert mistake["picture"].startswith("data:image/jpeg;base64,")


def test_canonical_prompts():
    encoder = encoder_with([0, 1, 2, 2])
    task = ZeroShotClassification(shards="x.tar", classnames=NAMES, templates=["a {}"], canonical=True)
    assert task.run(encoder).metrics["acc1"] == 1.0
    assert encoder.asked == ["a red fox", "a blue whale", "a hen"]


def test_a_label_without_a_name_is_an_error_naming_the_sample():
    task = ZeroShotClassification(shards="x.tar", classnames=NAMES, templates=["a {}"])
    with pytest.raises(UserError, match=r"label 3 of sample 00000\.tar/1 .*0\.\.2"):
        task.run(encoder_with([0, 3, 2, 2]))
