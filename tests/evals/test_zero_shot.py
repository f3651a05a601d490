import json

import numpy as np
import pytest
import torch

from siglip_train.errors import UserError
from siglip_train.evals.accuracy import accuracy_metrics
from siglip_train.evals.ranking import best_ranks_in_sets
from siglip_train.evals.zero_shot import ZeroShotClassification
from siglip_train.models.siglip import class_embeddings
from tests.evals.fakes import FakeEncoder, image_set
from tests.evals.goldens import load_goldens


def test_class_embeddings_equal_those_of_open_clip_and_big_vision():
    _, expected = load_goldens()
    prompts = torch.from_numpy(expected["zs/prompt_embeddings_normalized"])
    # any positive factor on a prompt must not matter
    ours = class_embeddings(prompts * torch.rand(13, 7, 1).add(0.5)).numpy()
    np.testing.assert_allclose(ours, expected["zs/open_clip_classifier"].T, atol=1e-6)
    np.testing.assert_allclose(ours, expected["zs/big_vision_class_embeddings"], atol=1e-6)


def metrics_of(images, classes, labels):
    return accuracy_metrics(best_ranks_in_sets(images, classes, labels[:, None]), len(classes), labels)


def test_accuracies_equal_a_plain_count():
    random = np.random.default_rng(1)
    images, classes = random.normal(size=(200, 6)), random.normal(size=(11, 6))
    labels = random.integers(0, 9, 200)  # classes 9 and 10 never occur
    order = (-(images @ classes.T)).argsort(axis=1)
    metrics = metrics_of(*(torch.from_numpy(part) for part in (images, classes, labels)))
    assert metrics["acc1"] == pytest.approx((order[:, 0] == labels).mean())
    assert metrics["acc5"] == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())
    recalls = [(order[labels == c, 0] == c).mean() for c in range(9)]
    assert metrics["mean_per_class_recall"] == pytest.approx(np.mean(recalls))


def test_fewer_than_five_classes_have_no_acc5():
    metrics = metrics_of(torch.eye(3), torch.eye(3), torch.arange(3))
    assert metrics == {"acc1": 1.0, "mean_per_class_recall": 1.0}


NAMES = ["red fox", "Blue_Whale", "hen"]


def encoder_with(labels, prompts=("a {}", "the {}")):
    eye = torch.eye(3)
    texts = {prompt.replace("{}", name): eye[row] for row, name in enumerate(NAMES) for prompt in prompts}
    texts |= {text.replace("_", " "): value for text, value in texts.items()}
    texts |= {text.lower(): value for text, value in texts.items()}
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


def test_any_label_of_a_set_is_right_and_images_without_one_do_not_count():
    encoder = encoder_with([(0, 2), (), (1,), (1, 2)])
    task = ZeroShotClassification(shards="x.tar", classnames=NAMES, templates=["a {}"], label="json:real")
    metrics, details = task.run(encoder)
    # images show classes 0, 1, 2, 2
    assert metrics == {"acc1": pytest.approx(2 / 3), "n": 3.0}
    assert details["counts"]["excluded/no label that counts"] == 1
    (mistake,) = details["mistakes"]
    assert (mistake["key"], mistake["label"]) == ("00000.tar/2", "Blue_Whale")


def test_label_sets_from_a_file_replace_labels(tmp_path):
    (tmp_path / "sets.json").write_text(json.dumps({"0": [1], "3": [2, 0]}))
    sets = str(tmp_path / "sets.json")
    task = ZeroShotClassification(shards="x.tar", classnames=NAMES, templates=["a {}"], label_sets=sets)
    metrics, details = task.run(encoder_with([0, 0, 0, 0]))
    assert metrics == {"acc1": 0.5, "n": 2.0}
    assert details["mistakes"][0]["label"] == "Blue_Whale"


def test_a_class_map_lets_several_classes_stand_for_one(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"5": [0, 1], "9": 2}))
    options = {"shards": "x.tar", "classnames": NAMES, "templates": ["a {}"]}
    task = ZeroShotClassification(**options, class_map=str(tmp_path / "map.json"))
    # images show classes 0, 1, 2, 2; class 7 stands for nothing
    metrics, details = task.run(encoder_with([5, 5, 9, 7]))
    assert metrics == {"acc1": 1.0, "mean_per_class_recall": 1.0, "n": 3.0}
    metrics, details = task.run(encoder_with([5, 9, 9, 5]))
    assert metrics == {"acc1": 0.5, "mean_per_class_recall": 0.5, "n": 4.0}
    assert [row["name"] for row in details["classes"]] == ["5", "9"]
    assert details["confusions"][0] == {"label": "5", "predicted": "hen", "images": 1}
    with pytest.raises(ValueError, match="give one of them"):
        ZeroShotClassification(**options, class_map="a", label_sets="b")


def test_groups_are_measured_apart():
    encoder = encoder_with([0, 1, 1, 1])
    encoder.images = encoder.images._replace(groups=["Asia", "Asia", "South/America", "Asia"])
    task = ZeroShotClassification(shards="x.tar", classnames=NAMES, templates=["a {}"], group="json:region")
    metrics, details = task.run(encoder)
    assert encoder.source.group == "json:region"
    assert metrics["Asia/acc1"] == pytest.approx(2 / 3)
    assert metrics["South-America/acc1"] == metrics["acc1_worst_group"] == 0.0
    assert metrics["acc1_disparity"] == pytest.approx(2 / 3)
    assert details["groups"][0] == {"name": "Asia", "images": 3, "acc1": pytest.approx(2 / 3)}


def test_intervals_surround_the_accuracy():
    task = ZeroShotClassification(shards="x.tar", classnames=NAMES, templates=["a {}"], bootstrap=200)
    metrics = task.run(encoder_with([0, 1, 2, 1])).metrics
    assert metrics["acc1_low"] < metrics["acc1"] < metrics["acc1_high"] == 1.0


def class_folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
    return str(root)


def test_folders_of_classes_name_them(tmp_path):
    folders = class_folders(tmp_path / "a", ["red fox", "Blue_Whale", "hen"])
    encoder = encoder_with([0, 1, 2, 2])
    ZeroShotClassification(shards=folders, templates=["a {}"]).run(encoder)
    assert encoder.asked == ["a Blue Whale", "a hen", "a red fox"]


def test_folders_that_do_not_fit_the_names_are_an_error(tmp_path):
    folders = class_folders(tmp_path / "a", ["n01", "n02"])
    with pytest.raises(UserError, match=r"2 class folders, but there are 3 classnames.*class_map"):
        ZeroShotClassification(shards=folders, classnames=NAMES).run(encoder_with([0, 1, 2, 2]))
    numbered = class_folders(tmp_path / "b", ["0", "2"])
    with pytest.raises(UserError, match="give classnames"):
        ZeroShotClassification(shards=numbered).run(encoder_with([0, 1, 2, 2]))
    task = ZeroShotClassification(shards=numbered, classnames=NAMES, templates=["a {}"])
    assert task.run(encoder_with([0, 1, 2, 2])).metrics["n"] == 4
    with pytest.raises(UserError, match=r"x\.tar does not say what its classes are called"):
        ZeroShotClassification(shards="x.tar").run(encoder_with([0, 1, 2, 2]))


def test_a_benchmark_folder_says_everything(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("red fox\nBlue_Whale\nhen\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    encoder = encoder_with([0, 1, 2, 1])
    assert ZeroShotClassification(shards=str(tmp_path)).run(encoder).metrics["acc1"] == 0.75
    assert encoder.asked[:2] == ["a red fox", "the red fox"]
    (tmp_path / "dataset_type.txt").write_text("multilabel\n")
    encoder = encoder_with([(0, 1), (1,), (), (0,)])
    metrics, _ = ZeroShotClassification(shards=str(tmp_path)).run(encoder)
    assert encoder.source.label == "npy"
    # class 0 is right at places 1 and 4 of its ranking, class 1 at 1 and 2, class 2 never
    assert metrics == {"mean_average_precision": pytest.approx(((1 + 2 / 4) / 2 + 1 + 0) / 3), "n": 4.0}


def test_every_file_it_reads_can_be_checked_before(tmp_path):
    folders = class_folders(tmp_path / "set", ["0", "1"])
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "map.json").write_text('{"0": 1}')
    fits = {"shards": folders, "classnames": ["owl", "hen"], "templates": ["a {}"]}
    ZeroShotClassification(**fits, label_sets=f"{tmp_path}/real.json").check()
    ZeroShotClassification(**fits, class_map=f"{tmp_path}/map.json").check()
    for name in ("shards", "classnames", "templates", "label_sets", "class_map"):
        with pytest.raises(UserError, match=r"nowhere"):
            ZeroShotClassification(**{**fits, name: f"{tmp_path}/nowhere"}).check()
    # a set in CLIP_benchmark's layout, one of its shards gone
    (tmp_path / "set" / "test").mkdir()
    (tmp_path / "set" / "test" / "nshards.txt").write_text("1")
    with pytest.raises(UserError, match=r"no shard matches .*test/0\.tar"):
        ZeroShotClassification(**fits).check()
