import json

import pytest
import torch

from siglip_train.errors import UserError
from siglip_train.evals.loader import Caption
from siglip_train.evals.retrieval import Retrieval, retrieval_metrics, retrieval_ranks
from tests.evals.fakes import FakeEncoder, image_set
from tests.evals.goldens import load_goldens


@pytest.mark.parametrize("name", ["flickr_like", "varied_caps", "paired", "ties"])
def test_equals_big_vision_open_clip_and_clip_benchmark(name):
    inputs, expected = load_goldens()
    images, texts, owners = (torch.from_numpy(inputs[f"{name}/{part}"]) for part in ("img", "txt", "txt2img"))
    metrics = retrieval_metrics(retrieval_ranks(images, texts, owners))
    compared = 0
    for ours, bv, open_clip in (("text", "img2txt", "image_to_text"), ("image", "txt2img", "text_to_image")):
        pairs = {f"{name}/bv/{bv}/Recall@{k}": f"{ours}_retrieval_recall@{k}" for k in (1, 5, 10)}
        pairs |= {
            f"{name}/open_clip/{open_clip}_{r}": f"{ours}_retrieval_{r}" for r in ("mean_rank", "median_rank")
        }
        pairs |= {
            f"{name}/clip_benchmark/{ours}_retrieval_recall@{k}": f"{ours}_retrieval_recall@{k}"
            for k in (1, 5)
        }
        for theirs, metric in pairs.items():
            if theirs in expected:
                # clip_benchmark averages in fp32, hence not exact
                assert metrics[metric] == pytest.approx(float(expected[theirs]), abs=1e-7), metric
                compared += 1
    assert compared >= 6


def captioned(languages=("de", "en"), count=12):
    """Make a set in which German finds everything, and English swaps neighbours."""
    eye = torch.eye(count)
    captions = [[Caption(language, f"{language} {row}") for language in languages] for row in range(count)]
    texts = {f"de {row}": eye[row] for row in range(count)}
    texts |= {f"en {row}": eye[row ^ 1] for row in range(count)}
    texts |= {f" {row}": eye[row] for row in range(count)}
    return FakeEncoder(image_set(eye, captions), texts)


def test_languages_are_measured_apart_and_averaged():
    encoder = captioned()
    metrics, details = Retrieval(shards="x.tar", text="json:captions").run(encoder)
    assert metrics["de/image_retrieval_recall@1"] == 1.0
    assert metrics["en/image_retrieval_recall@1"] == 0.0
    assert metrics["image_retrieval_recall@1"] == 0.5
    assert metrics["text_retrieval_mean_rank"] > 1
    assert set(details["languages"]) == {"de", "en"}
    assert encoder.source.text == "json:captions"


def test_chosen_languages_only_and_no_prefix_for_a_single_one():
    metrics, details = Retrieval(shards="x.tar", languages=["de"]).run(captioned())
    assert metrics["image_retrieval_recall@1"] == 1.0
    assert not any("/" in name for name in metrics)
    assert list(details["languages"]) == ["de"]


def test_a_language_without_captions_is_an_error_that_names_those_found():
    with pytest.raises(UserError, match=r"fr .*de, en"):
        Retrieval(shards="x.tar", languages=["de", "fr"]).run(captioned())


def test_images_without_a_caption_in_the_language_are_no_candidates():
    encoder = captioned()
    for row in range(0, 12, 2):
        encoder.images.captions[row][:] = [Caption("de", f"de {row}")]
    metrics, _ = Retrieval(shards="x.tar", languages=["en"]).run(encoder)
    # six images are left, none of which is the swapped neighbour: all scores are 0, so the order is the index
    assert metrics["image_retrieval_mean_rank"] == pytest.approx(3.5)


def test_several_captions_an_image_count_as_any_of_them():
    eye = torch.eye(4)
    captions = [[Caption("", f"good {row}"), Caption("", f"bad {row}")] for row in range(4)]
    texts = {f"good {row}": eye[row] for row in range(4)} | {f"bad {row}": -eye[row] for row in range(4)}
    metrics, _ = Retrieval(shards="x.tar").run(FakeEncoder(image_set(eye, captions), texts))
    assert metrics["text_retrieval_recall@1"] == 1.0
    assert metrics["image_retrieval_recall@1"] == 0.5


def test_details_show_queries_with_what_they_found():
    _, details = Retrieval(shards="x.tar", gallery=4).run(captioned())
    json.dumps(details)
    assert len(details["image_retrieval"]) == 4
    german = details["image_retrieval"][0]
    assert german["results"][0]["correct"]
    assert german["results"][0]["picture"].startswith("data:image/jpeg;base64,")
    assert [found["correct"] for found in details["text_retrieval"][0]["results"]] == [True] + 4 * [False]
    assert [entry["query"] for entry in details["image_retrieval"]] == ["de 0", "de 6", "en 3", "en 9"]
    similarity = details["similarity"]
    assert similarity["captions"][:4] == ["de 0", "en 1", "de 2", "en 3"]
    assert (similarity["values"][2][2], similarity["values"][3][2], similarity["values"][3][3]) == (
        1.0,
        1.0,
        0.0,
    )


def test_other_ranks_get_the_metrics_without_pictures():
    encoder = captioned()
    other = FakeEncoder(encoder.images, encoder.texts, rank=1)
    metrics, details = Retrieval(shards="x.tar").run(other)
    assert metrics == Retrieval(shards="x.tar").run(encoder).metrics
    assert details == {}


def test_a_benchmark_folder_of_retrieval_has_a_caption_a_line(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    eye = torch.eye(3)
    images = image_set(eye, [[Caption("", f"good {row}\n\nbad {row}")] for row in range(3)])
    texts = {f"good {row}": eye[row] for row in range(3)} | {f"bad {row}": -eye[row] for row in range(3)}
    encoder = FakeEncoder(images, texts)
    metrics, _ = Retrieval(shards=str(tmp_path)).run(encoder)
    assert encoder.asked[:3] == ["good 0", "bad 0", "good 1"]
    assert (metrics["text_retrieval_recall@1"], metrics["image_retrieval_recall@1"]) == (1.0, 0.5)
    # anywhere else a line break is part of the caption
    encoder.texts = {caption.text: eye[0] for (caption,) in images.captions}
    Retrieval(shards="x.tar").run(encoder)
    assert encoder.asked == list(encoder.texts)


def test_intervals_draw_images_with_their_captions():
    # every image finds and is found in German; in English none
    metrics, _ = Retrieval(shards="x.tar", bootstrap=50).run(captioned())
    for name in ("image_retrieval_recall@1", "text_retrieval_recall@1"):
        assert (metrics[f"{name}_low"], metrics[f"{name}_high"]) == (0.5, 0.5)
    encoder = captioned(languages=("en",))
    # half the images are found
    encoder.texts |= {f"en {row}": torch.eye(12)[row] for row in (0, 1, 4, 5, 8, 9)}
    metrics, _ = Retrieval(shards="x.tar", bootstrap=500).run(encoder)
    assert metrics["image_retrieval_recall@1"] == 0.5
    # 12 images: the standard error is 0.144
    assert metrics["image_retrieval_recall@1_low"] == pytest.approx(0.5 - 1.96 * 0.144, abs=0.06)
    assert metrics["image_retrieval_recall@1_high"] == pytest.approx(0.5 + 1.96 * 0.144, abs=0.06)
