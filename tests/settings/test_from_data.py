"""What a config leaves to the data: classes, epochs, and a part of the samples that is held out and measured."""

from pathlib import Path
from typing import Any

import pytest

from siglip_train.config import parse
from siglip_train.data.shards.select import Selection
from siglip_train.errors import UserError
from siglip_train.settings.from_data import fill_from_data
from siglip_train.settings.starting_point import Filled, fill
from tests.composing import composed
from tests.data.conftest import encoded, picture
from tests.data.shard_files import sample, write_tar
from tests.ranks import run_ranks


def labelled(path: Path, labels: list[Any], **members: bytes) -> Path:
    """A shard with a sample of each label."""
    name = path.stem
    return write_tar(
        path,
        [
            member
            for number, label in enumerate(labels)
            for member in sample(f"{name}-{number:03d}", number % 7, cls=str(label).encode(), **members)
        ],
    )


def run_of(shards: str, *overrides: str, earlier: dict[str, Any] | None = None) -> Filled:
    """What `finetune_full` becomes with these shards."""
    values = composed(
        "experiment=finetune_full", "tokenizer=.", f"++data.sources.mine.shards={shards}", *overrides
    )
    values = fill(values).values
    return fill_from_data(values, parse(values), earlier or {})


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """120 samples of the labels 0 to 3, 5 in two shards."""
    labelled(tmp_path / "a.tar", [0, 1, 2, 3, 5] * 12)
    labelled(tmp_path / "b.tar", [3, 2, 1, 0] * 15)
    return f"{tmp_path}/?.tar"


def test_classes_are_counted_by_the_largest_label_held_out_or_not(shards: str) -> None:
    values, notes = run_of(shards)
    assert values["objectives"]["classification"]["classes"] == 6
    assert notes[:2] == [
        "1 of the labels 0 to 5 stand at no sample",
        "objectives.classification: 6 classes",
    ]


def test_given_classes_are_not_counted(shards: str) -> None:
    values, _ = run_of(shards, "objectives.classification.classes=37")
    assert values["objectives"]["classification"]["classes"] == 37


def test_names_say_how_many_classes_there_are_and_are_kept(shards: str, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    given = f"objectives.classification.classnames={names}"
    head = run_of(shards, given).values["objectives"]["classification"]
    assert (head["classes"], head["classnames"]) == (2, ["cat", "dog"])
    # a run goes on with the names that it has, wherever their file is
    names.unlink()
    earlier = {"objectives": {"classification": head}}
    assert run_of(shards, given, earlier=earlier).values["objectives"]["classification"] == head
    with pytest.raises(UserError, match=r"class names: cannot read .*names\.txt"):
        run_of(shards, given)


def test_a_run_that_goes_on_does_not_count_again(shards: str) -> None:
    earlier = {"objectives": {"classification": {"classes": 11}}}
    assert run_of(shards, earlier=earlier).values["objectives"]["classification"]["classes"] == 11


@pytest.mark.parametrize(
    ("label", "message"),
    [("cat", "cls is 'cat', not an integer; labels are numbers from 0 on, and names"), (-1, "labels begin")],
)
def test_a_label_that_is_none_is_told(tmp_path: Path, label: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_of(str(labelled(tmp_path / "a.tar", [0, label] * 100)))


def test_labels_that_are_missing_everywhere_are_told(tmp_path: Path) -> None:
    shard = labelled(tmp_path / "a.tar", [0] * 200)
    with pytest.raises(UserError, match="no sample has a label to count the classes by"):
        run_of(str(shard), "++data.sources.mine.label=json:kind")


def test_remote_shards_are_not_fetched_to_be_counted(tmp_path: Path) -> None:
    shard = labelled(tmp_path / "a.tar", [0, 1] * 100)
    with pytest.raises(
        UserError, match=r"1 remote shards, such as a\.tar, would all be fetched to count classes"
    ):
        run_of(f"'pipe:cat {shard}'")


def test_epochs_are_those_of_the_samples_that_train(shards: str) -> None:
    values, notes = run_of(shards, "total_epochs=2.5")
    part = Selection(held_out=0.2)
    count = sum(f"{name}-{number:03d}" in part for name in "ab" for number in range(60))
    assert 80 < count < 110
    assert (values["total_samples"], values["total_epochs"]) == (round(2.5 * count), None)
    assert notes[-1] == f"total_epochs=2.5 of {count} samples: total_samples={values['total_samples']}"


def test_a_fifth_is_held_out_and_measured(shards: str) -> None:
    values, _ = run_of(shards)
    task = values["evaluation"]["tasks"]["held_out"]
    assert values["data"]["sources"]["mine"]["select"] == {"held_out": 0.2, "part": "train"}
    assert task["select"] == {"keys": "", "held_out": 0.2, "by": "(.*)", "part": "held_out"}
    assert (task["shards"], task["label"]) == (shards, "cls")


def test_a_selection_of_ones_own_is_kept_and_its_other_part_measured(shards: str) -> None:
    values, _ = run_of(shards, "++data.sources.mine.select={held_out: 0.5, by: '^(.)'}")
    assert values["data"]["sources"]["mine"]["select"] == {"held_out": 0.5, "by": "^(.)", "part": "train"}
    assert values["evaluation"]["tasks"]["held_out"]["select"]["held_out"] == 0.5
    values, _ = run_of(shards, "++data.sources.mine.select={keys: a}")
    assert values["data"]["sources"]["mine"]["select"] == {"held_out": 0.2, "part": "train", "keys": "a"}
    assert values["evaluation"]["tasks"]["held_out"]["select"]["keys"] == "a"
    with pytest.raises(UserError, match=r"nothing is: set evaluation\.held_out=0\.2"):
        run_of(shards, "evaluation.held_out=0")


def test_with_a_set_of_its_own_nothing_is_held_out(shards: str) -> None:
    values, _ = run_of(shards, "evaluation.tasks.held_out.shards=test.tar", "total_epochs=1")
    assert "select" not in values["data"]["sources"]["mine"]
    assert values["total_samples"] == 120
    assert values["evaluation"]["tasks"]["held_out"] == {
        "_target_": "siglip_train.evals.classification.HeadAccuracy",
        "shards": "test.tar",
    }


def test_sources_are_measured_together_if_they_are_alike(shards: str, tmp_path: Path) -> None:
    more = labelled(tmp_path / "more" / "c.tar", [0, 1] * 40)
    values, _ = run_of(shards, f"++data.sources.more.shards={more}")
    assert values["evaluation"]["tasks"]["held_out"]["shards"] == [shards, str(more)]
    with pytest.raises(UserError, match=r"which differ in label: give evaluation\.tasks\.NAME\.shards"):
        run_of(shards, f"++data.sources.more={{shards: {more}, label: 'json:number'}}")


def class_folders(folder: Path, names: str) -> Path:
    """Sixty images in folders of these names."""
    for name in names.split():
        (folder / name).mkdir(parents=True)
        for number in range(60 // len(names.split())):
            (folder / name / f"{number}.png").write_bytes(encoded(picture(number % 5)))
    return folder


def run_of_folder(folder: Path, *overrides: str, earlier: dict[str, Any] | None = None) -> Filled:
    given = f"++data.sources.mine.folder={folder}"
    return run_of("null", given, f"data.cache_dir={folder.parent}/cache", *overrides, earlier=earlier)


def test_a_folder_is_packed_and_says_the_classes(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "mine", "hat shoe coat")
    values, notes = run_of_folder(folder)
    head, source = values["objectives"]["classification"], values["data"]["sources"]["mine"]
    assert (head["classes"], head["classnames"]) == (3, ["coat", "hat", "shoe"])
    assert source["folder"] == str(folder)
    assert values["evaluation"]["tasks"]["held_out"]["shards"] == source["shards"]
    assert notes[0] == "objectives.classification: 3 classes"
    assert values["total_samples"] < 30 * 60
    # more folders are other classes, which a run that goes on does not have
    (folder / "belt").mkdir()
    (folder / "belt" / "0.png").write_bytes(encoded(picture(9)))
    with pytest.raises(
        UserError, match="are now belt, coat, hat, shoe, and the run that goes on has coat, hat"
    ):
        run_of_folder(folder, earlier=values)


def test_a_folder_without_captions_is_told_where_they_are_needed(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "mine", "a b")
    with pytest.raises(
        UserError, match=r"mine: no sample of it can be trained on \(\d+ no text\).* --caption-template"
    ):
        run_of_folder(folder, "data.source_defaults.text=txt")


def test_names_of_a_file_may_not_contradict_those_of_the_folders(tmp_path: Path) -> None:
    folder, names = class_folders(tmp_path / "mine", "n02 n01"), tmp_path / "names.txt"
    given = f"objectives.classification.classnames={names}"
    names.write_text("tench\nshark\n")
    assert run_of_folder(folder, given).values["objectives"]["classification"]["classnames"] == [
        "tench",
        "shark",
    ]
    names.write_text("n02\nn01\n")
    with pytest.raises(
        UserError, match=r"in another order than the labels of data\.sources: n01, n02; leave"
    ):
        run_of_folder(folder, given)


def test_folders_of_several_sources_have_the_same_classes(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "mine", "a b")
    same, other = class_folders(tmp_path / "same", "b a"), class_folders(tmp_path / "other", "a c")
    head = run_of_folder(folder, f"++data.sources.more.folder={same}").values["objectives"]["classification"]
    assert head["classnames"] == ["a", "b"]
    with pytest.raises(
        UserError, match=r"data\.sources\.more\.folder: its classes are a, c, and those of another"
    ):
        run_of_folder(folder, f"++data.sources.more.folder={other}")


def counted_by_all(shards: str) -> tuple[int, int]:
    values, _ = run_of(shards)
    return values["objectives"]["classification"]["classes"], values["total_samples"]


@pytest.mark.dist
def test_all_ranks_count_the_same(shards: str) -> None:
    found = run_ranks(2, counted_by_all, shards)
    assert found[0] == found[1] == list(counted_by_all(shards))


@pytest.mark.dist
def test_what_one_rank_finds_wrong_all_say(tmp_path: Path) -> None:
    labelled(tmp_path / "a.tar", [0, 1] * 100)
    labelled(tmp_path / "b.tar", ["cat"] * 100)
    said = run_ranks(2, complaint, f"{tmp_path}/?.tar")
    assert said[0] == said[1]
    assert "cls is 'cat'" in said[0]


def complaint(shards: str) -> str:
    with pytest.raises(UserError) as raised:
        run_of(shards)
    return str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["total_epochs=null"], "one of them says how long to train, and neither is given"),
        (["total_samples=100"], "and both are given; set one of them to null"),
        (["total_epochs=0"], "total_epochs: must be above 0, got 0"),
        (["evaluation.held_out=1"], "held_out must be a share in 0..1, below 1"),
        (
            ["++data.sources.mine.folder=x"],
            "data.sources.mine: shards and folder are given, and samples lie in one",
        ),
        (
            ["++data.sources.mine.shards=null"],
            "no samples: give shards='/data/web/*.tar', or folder=/data/images",
        ),
    ],
)
def test_contradictions_are_told_in_a_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        run_of("any.tar", *overrides)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
