"""ImageNet-ReaL's and ObjectNet's files, in small."""

import json
from pathlib import Path

import pytest

from siglip_train.errors import UserError
from siglip_train.evals.label_sets import labelled_truth, mapped_truth, read_class_map, read_label_sets


def written(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_a_list_is_in_the_order_of_the_validation_pictures(tmp_path: Path):
    path = written(tmp_path / "real.json", [[7], [], [1, 2]])
    keys = [
        "val/n02/ILSVRC2012_val_00000003",
        "val/n01/ILSVRC2012_val_00000001",
        "x.tar/ILSVRC2012_val_00000002",
    ]
    assert read_label_sets(path, keys) == [(1, 2), (7,), ()]


def test_an_object_is_by_key(tmp_path: Path):
    path = written(tmp_path / "sets.json", {"a": [4], "b": [0, 1]})
    assert read_label_sets(path, ["0.tar/b", "0.tar/c", "1.tar/a"]) == [(0, 1), (), (4,)]


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        ([[1]], ["0.tar/s0000000"], "s0000000"),
        ({"a": [1]}, ["0.tar/b"], "names none of the 1 images, such as 'b'"),
        ({"a": ["dog"]}, ["0.tar/a"], r"\['dog'\] is neither a label"),
        ("text", ["0.tar/a"], "neither a list nor an object"),
    ],
)
def test_a_file_that_cannot_fit_is_an_error(tmp_path: Path, content: object, keys: list[str], message: str):
    with pytest.raises(UserError, match=message):
        read_label_sets(written(tmp_path / "sets.json", content), keys)


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(UserError, match="cannot read"):
        read_class_map(str(tmp_path / "none.json"))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_class_map(str(tmp_path / "a.json"))


def test_objectnets_tables_are_joined(tmp_path: Path):
    # number in the common order -> line in the 2012 order
    written(tmp_path / "pytorch_to_imagenet_2012_id.json", {"2": 0, "0": 1, "1": 2})
    (tmp_path / "imagenet_to_label_2012_v2").write_text("analog clock\ndigital clock\nbanana\n")
    written(tmp_path / "folder_to_objectnet_label.json", {"alarm_clock": "Alarm clock", "comb": "Comb"})
    written(tmp_path / "objectnet_to_imagenet_1k.json", {"Alarm clock": "analog clock; banana"})
    assert read_class_map(str(tmp_path)) == {"alarm_clock": (2, 1)}
    written(tmp_path / "objectnet_to_imagenet_1k.json", {"Alarm clock": "hourglass"})
    with pytest.raises(UserError, match="not ObjectNet's"):
        read_class_map(str(tmp_path))


def test_a_class_map_is_an_object_of_labels(tmp_path: Path):
    assert read_class_map(written(tmp_path / "map.json", {"clock": [5, 2], "comb": 7})) == {
        "clock": (5, 2),
        "comb": (7,),
    }
    with pytest.raises(UserError, match="holds no object"):
        read_class_map(written(tmp_path / "map.json", [1, 2]))


def test_truth_leaves_images_without_a_label_out():
    truth = labelled_truth([(1,), (), (0, 2)], ["a", "b", "c"], ["x", "y", "z"])
    assert truth.rows == [0, 2]
    assert truth.targets.tolist() == [[1, -1], [0, 2]]
    assert truth.owners is None
    with pytest.raises(UserError, match=r"label 3 of sample c .*0\.\.2"):
        labelled_truth([(1,), (), (0, 3)], ["a", "b", "c"], ["x", "y", "z"])


def test_mapped_truth_predicts_mapped_classes_only():
    class_map = {"clock": (5, 2), "comb": (7,)}
    truth = mapped_truth([(0,), (1,), (2,)], class_map, {0: "clock", 1: "chair", 2: "comb"}, 8)
    assert truth.candidates.tolist() == [2, 5, 7]
    assert (truth.rows, truth.targets.tolist()) == ([0, 2], [[1, 0], [2, -1]])
    assert [truth.names[label] for label in truth.owners.tolist()] == ["clock", "comb"]
    # labels of shards are numbers
    assert mapped_truth([(4,)], {"4": (1,)}, {}, 2).targets.tolist() == [[0]]
    with pytest.raises(UserError, match="names for 7 of them"):
        mapped_truth([(0,)], class_map, {}, 7)
    with pytest.raises(UserError, match="none of 1 images"):
        mapped_truth([(1,)], class_map, {}, 8)
