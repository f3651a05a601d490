"""Probes against plain re-statements of their protocols, and the rules of the task around them."""

import math

import numpy as np
import pytest
import torch

from siglip_train.data.shards.select import Selection
from siglip_train.errors import UserError
from siglip_train.evals.features import Features
from siglip_train.evals.few_shot import RidgeFewShot, draw, ridge_scores
from siglip_train.evals.linear_probe import LinearProbe, linear_scores, logistic_regression
from siglip_train.evals.loader import EvaluationSource
from siglip_train.evals.nearest_neighbours import NearestNeighbours
from siglip_train.evals.probes import Probes
from tests.evals.fakes import FakeEncoder, image_set

CLASSES, WIDTH = 4, 12


def features(train: int = 60, test: int = 40, noise: float = 1.5, seed: int = 0) -> Features:
    """Classes around centres, noisy enough that no method gets all right."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    parts = []
    for count in (train, test):
        labels = torch.randint(CLASSES, (count,), generator=generator)
        parts += [centres[labels] + noise * torch.randn(count, WIDTH, generator=generator) + 3, labels]
    return Features(*parts, CLASSES)


def accuracy(ranks: torch.Tensor) -> float:
    return (ranks == 0).double().mean().item()


def test_neighbours_vote_by_their_cosines():
    given = features()
    (ranks,) = NearestNeighbours(k=7, temperature=0.2).fit(given)[0]["knn"]
    train, test = (part / part.norm(dim=1, keepdim=True) for part in (given.train, given.test))
    for image, label, rank in zip(test, given.test_labels.tolist(), ranks.tolist(), strict=True):
        cosines = sorted(
            ((float(image @ other), int(c)) for other, c in zip(train, given.train_labels, strict=True)),
            reverse=True,
        )
        votes = [sum(math.exp(cos / 0.2) for cos, c in cosines[:7] if c == each) for each in range(CLASSES)]
        assert rank == sum(vote > votes[label] for vote in votes) or votes[label] == 0
    assert 0.4 < accuracy(ranks) < 1
    assert NearestNeighbours(k=500).fit(given)[0]["knn"][0].shape == (40,)


def big_visions_scores(x, y, x_test, l2):
    """fewshot_lsr's formulas in fp64: whitening, the constant 100, and the eigenvalues of either product."""
    mean, std = x.mean(axis=0, keepdims=True), x.std(axis=0, keepdims=True) + 1e-5
    x, x_test = (
        (np.pad((part - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)) for part in (x, x_test)
    )
    y = 2.0 * np.eye(CLASSES)[y] - 1
    if len(x) >= x.shape[1]:
        eigenvalues, q = np.linalg.eigh(x.T @ x)
        left, right = q, q.T @ (x.T @ y)
    else:
        eigenvalues, q = np.linalg.eigh(x @ x.T)
        left, right = x.T @ q, q.T @ y
    return x_test @ ((left / (eigenvalues + l2)) @ right)


@pytest.mark.parametrize("count", [5, 60])
def test_ridge_regression_equals_big_visions(count):
    given = features()
    ours = ridge_scores(given.train[:count], given.train_labels[:count], given.test, CLASSES, 2.0**10)
    parts = (
        given.train[:count].double().numpy(),
        given.train_labels[:count].numpy(),
        given.test.double().numpy(),
    )
    np.testing.assert_allclose(ours.numpy(), big_visions_scores(*parts, 2.0**10), atol=1e-9)


def test_shots_are_drawn_of_each_class_by_seed():
    given = features()
    labels = given.train_labels.numpy()
    for seed in range(2):
        random = np.random.default_rng(seed)
        expected = [random.permutation(np.where(labels == each)[0]) for each in range(CLASSES)]
        assert all(np.array_equal(*pair) for pair in zip(draw(labels, CLASSES, seed), expected, strict=True))
    ranks, numbers = RidgeFewShot(shots=[1, 200], seeds=2).fit(given)
    assert {name: len(repetitions) for name, repetitions in ranks.items()} == {"1shot": 2, "200shot": 2}
    assert numbers == {}
    # of fewer images than shots all are taken, whatever the seed
    assert accuracy(ranks["200shot"][0]) == accuracy(ranks["200shot"][1]) > accuracy(ranks["1shot"][0])


@pytest.mark.parametrize("l2", [1e-2, 1.0])
def test_logistic_regression_is_where_the_gradient_vanishes(l2):
    given = features()
    x, y = given.whitened()[0], given.train_labels
    weights = logistic_regression(x, y, CLASSES, l2, iterations=200)
    logits = linear_scores(weights, x).numpy()
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = (p / p.sum(axis=1, keepdims=True) - np.eye(CLASSES)[y.numpy()]) / len(x)
    gradient = np.concatenate(
        [error.T @ x.numpy() + l2 * weights[:, :-1].numpy(), error.sum(axis=0)[:, None]], axis=1
    )
    # measured 1e-8
    assert np.abs(gradient).max() < 1e-6


def test_linear_probe_takes_the_penalty_that_holds_outside_its_training_images():
    given, penalties = features(noise=2.5), [100.0, 1.0, 0.01]
    x, y = given.whitened()[0], given.train_labels
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    outside, kept = order[:12], order[12:]
    right = []
    for l2 in penalties:
        weights = logistic_regression(x[kept], y[kept], CLASSES, l2, iterations=200)
        right.append(int((linear_scores(weights, x[outside]).argmax(dim=1) == y[outside]).sum()))
    ranks, numbers = LinearProbe(l2=penalties).fit(given)
    assert len(set(right)) > 1, "the penalties must differ for a test of the choice"
    assert numbers["lp_l2"] == penalties[right.index(max(right))]
    # trained anew on all images
    assert ranks["lp"][0].equal(LinearProbe(l2=[numbers["lp_l2"]]).fit(given)[0]["lp"][0])
    # every penalty gets the same right: the strongest is taken
    easy = features(noise=0.01)
    assert LinearProbe(l2=[0.1, 1e-4]).fit(easy)[1] == {"lp_l2": 0.1}


class TwoSets(FakeEncoder):
    """Gives the training images for the shards `train`, else the test images."""

    def encode_images(self, source: EvaluationSource, encode=None):
        assert encode == self.pool_images, "probes are trained on what the tower gives"
        self.source = source
        self.centers = {*getattr(self, "centers", ()), source.center}
        given = features()
        name = "train" if source.select.part == "train" and source.shards != "test" else "test"
        rows = {"train": given.train, "test": given.test}[name]
        labels = {"train": given.train_labels, "test": given.test_labels}[name]
        images = image_set(rows, [[] for _ in rows], labels.tolist())
        return images._replace(keys=[f"{name}/{row}" for row in range(len(rows))])


def test_the_task_measures_every_method_on_what_its_protocol_embeds():
    encoder = TwoSets(image_set(torch.eye(2), [[], []]), {})
    linear = LinearProbe(l2=[0.1])
    test = {"shards": "test", "label": "json:c"}
    metrics, details = Probes(train="train", test=test, methods={"linear": linear}, bootstrap=50).run(encoder)
    assert encoder.source == EvaluationSource("test", label="json:c", center=224 / 256)
    assert encoder.centers == {1.0, 224 / 256}, "big_vision's few-shot crops, the others do not"
    given = features()
    assert metrics["knn_acc1"] == accuracy(NearestNeighbours().fit(given)[0]["knn"][0])
    few = [accuracy(ranks) for ranks in RidgeFewShot().fit(given)[0]["10shot"]]
    assert metrics["10shot_acc1"] == pytest.approx(np.mean(few))
    assert metrics["lp_acc1"] == accuracy(linear.fit(given)[0]["lp"][0])
    assert metrics["lp_acc1_low"] < metrics["lp_acc1"] < metrics["lp_acc1_high"]
    assert {"lp_mean_per_class_recall", "1shot_acc1", "25shot_acc1_low", "lp_l2"} <= metrics.keys()
    assert sum(row["images"] for row in details["classes"]) == metrics["n"] == 40
    part = {"shards": "x", "select": {"held_out": 0.5, "part": "held_out"}}
    only = Probes(train="train", test=part, methods={"few_shot": None, "linear": None})
    assert set(only.run(encoder).metrics) == {"knn_acc1", "knn_mean_per_class_recall", "n"}
    assert encoder.source.select == Selection(held_out=0.5, part="held_out")


def test_samples_in_both_sets_are_an_error():
    encoder = TwoSets(image_set(torch.eye(2), [[], []]), {})
    with pytest.raises(UserError, match=r"60 samples, such as train/0, are in both train and test"):
        Probes(train="x", test="x").run(encoder)


def test_an_image_of_several_classes_is_an_error():
    images = image_set(torch.eye(3), [[], [], []], [(0,), (1, 2), (1,)])
    with pytest.raises(UserError, match=r"00000.tar/1 has the labels \[1, 2\]"):
        Probes(train="a", test="b").run(FakeEncoder(images, {}))


def test_ranges_are_checked():
    for wrong in (
        lambda: NearestNeighbours(k=0),
        lambda: RidgeFewShot(shots=[]),
        lambda: LinearProbe(held_out=1.0),
        lambda: Probes(train="x", test="y", methods={"knn": NearestNeighbours(center=1.5)}),
        lambda: Probes(train="x", test={"shards": "y", "center": 0.5}),
        lambda: Probes(train="x", test="y", methods=dict.fromkeys(("knn", "few_shot", "linear"))),
    ):
        with pytest.raises(ValueError, match=r"must be|between|belongs to|every method"):
            wrong()
