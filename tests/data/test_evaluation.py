"""The evaluation loader: every sample once, fillers, captions, labels, images."""

import json
from pathlib import Path

import numpy as np
import pytest

from siglip_train.data.image_transform import ImageTransform
from siglip_train.errors import UserError
from siglip_train.evals.loader import Caption, EvaluationLoader, EvaluationSource, build_evaluation_loader
from tests.data.conftest import picture
from tests.data.shard_files import sample, without, write_shards, write_tar

TRANSFORM = ImageTransform(16, 8, flip=True, min_crop_area=0.5)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("siglip_train.data.remote.locations.default_cache", lambda: tmp_path / "cache")


def _build(source: EvaluationSource, rank: int = 0, world_size: int = 1, **options: int) -> EvaluationLoader:
    options = {"batch_size": 4, **options}
    return build_evaluation_loader(source, TRANSFORM, rank=rank, world_size=world_size, **options)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (3, 1), (4, 0), (9, 0)])
def test_every_sample_once_in_file_order_in_equal_batches(tmp_path: Path, world_size: int, workers: int):
    source = EvaluationSource(write_shards(tmp_path, [4, 0, 5, 1]), text="txt")
    places, shapes = [], set()
    for rank in range(world_size):
        loader = _build(source, rank, world_size, workers=workers)
        assert loader.samples == 10
        batches = list(loader)
        assert len(batches) == len(loader)
        shapes.add(tuple(batch.images.patches.shape for batch in batches))
        places += [int(place) for batch in batches for place in batch.index if place >= 0]
        for batch in batches:
            for row, place in enumerate(batch.index.tolist()):
                if place < 0:
                    assert (batch.keys[row], batch.captions[row]) == ("", [])
                    assert not batch.images.patches[row].any()
                else:
                    assert batch.keys[row].endswith(f"/{place:05d}")
                    assert batch.captions[row] == [Caption("", f"caption {place}")]
                    expected = TRANSFORM(picture(place))
                    np.testing.assert_array_equal(batch.images.patches[row].numpy(), expected)
            assert batch.images.grid.equal(TRANSFORM.grid.expand(4, -1, -1))
    assert places == list(range(10))
    # the same number and size of batches on every rank
    assert len(shapes) == 1


def test_it_may_be_iterated_again(tmp_path: Path):
    loader = _build(EvaluationSource(write_shards(tmp_path, [5])))
    first, second = ([batch.keys for batch in loader] for _ in range(2))
    assert first == second


def test_max_samples_is_the_beginning(tmp_path: Path):
    loader = _build(EvaluationSource(write_shards(tmp_path, [5, 5]), max_samples=7))
    assert loader.samples == 7
    assert [int(i) for batch in loader for i in batch.index] == [0, 1, 2, 3, 4, 5, 6, -1]


def _captions(tmp_path: Path, text: str, content: dict) -> list[Caption]:
    path = write_tar(tmp_path / "a.tar", sample("a", json=json.dumps(content).encode()))
    (batch,) = _build(EvaluationSource(str(path), text=text))
    return batch.captions[0]


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        ("txt", {}, [("", "caption 0")]),
        ("txt", {"lang": "de"}, [("de", "caption 0")]),
        ("txt", {"language": "fr"}, [("fr", "caption 0")]),
        ("json:c", {"c": "x"}, [("", "x")]),
        ("json:c", {"c": ["x", "", "y"], "lang": "en"}, [("en", "x"), ("en", "y")]),
        ("json:c.*", {"c": {"de": "x", "en": ["y", "z"]}}, [("de", "x"), ("en", "y"), ("en", "z")]),
        ("json:c", {"c": {"de": "x", "en": ""}, "lang": "zh"}, [("de", "x")]),
        ("json:c.de", {"c": {"de": "x"}}, [("", "x")]),
        # the annotations of XM3600
        ("json:*.caption", {"image/key": "k", "de": {"caption": ["x", "y"]}}, [("de", "x"), ("de", "y")]),
    ],
)
def test_captions_and_their_languages(tmp_path: Path, text: str, content: dict, expected: list):
    assert _captions(tmp_path, text, content) == expected


def test_labels_from_cls_and_json(tmp_path: Path):
    path = str(write_tar(tmp_path / "a.tar", sample("a", cls=b"7\n", json=b'{"class_index": 3}')))
    for label, expected in (("cls", 7), ("json:class_index", 3)):
        (batch,) = _build(EvaluationSource(path, label=label))
        assert batch.labels == [(expected,), (), (), ()]
    (batch,) = _build(EvaluationSource(path))
    assert batch.labels is None
    assert batch.captions[0] == []


def test_bad_samples_become_fillers_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [
        sample("good", cls=b"1"), sample("no-label"), sample("word", cls=b"dog"), sample("float", cls=b"1.5"),
        sample("broken", png=b"x", cls=b"1"), sample("empty", txt=b"", cls=b"1"), without(sample("lacks"), "txt"),
    ]  # fmt: skip
    path = str(write_tar(tmp_path / "a.tar", [member for row in rows for member in row]))
    loader = _build(EvaluationSource(path, text="txt", label="cls"), batch_size=8)
    (batch,) = loader
    assert batch.index.tolist() == [0, -1, -1, -1, -1, -1, -1, -1]
    assert loader.counts == {
        "seen": 6, "bad/bad label": 3, "bad/broken image": 1, "bad/empty caption": 1, "excluded/no text": 1,
    }  # fmt: skip
    for key in ("no-label", "word", "float", "broken", "empty", "lacks"):
        assert f"bad sample a.tar/{key}:" in caplog.text


def test_any_picture_is_at_hand_on_any_rank(tmp_path: Path):
    loader = _build(EvaluationSource(write_shards(tmp_path, [3, 3])), rank=1, world_size=2)
    for number in (0, 2, 3, 5):
        np.testing.assert_array_equal(np.asarray(loader.original(number)), np.asarray(picture(number)))


@pytest.mark.parametrize(
    "wrong",
    [{"max_samples": 0}, {"max_samples": -1}, {"border": -1}, {"center": 0.0}, {"center": 1.5}, {"max_pixels": 0}],
)  # fmt: skip
def test_ranges_are_checked(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvaluationSource("x.tar", **wrong)


def test_a_set_without_a_complete_sample_is_an_error(tmp_path: Path):
    path = str(write_tar(tmp_path / "a.tar", without(sample("a"), "txt")))
    with pytest.raises(UserError, match=r"no complete sample .*1 no text"):
        _build(EvaluationSource(path, text="txt"))
    assert _build(EvaluationSource(path)).samples == 1
