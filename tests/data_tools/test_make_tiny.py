"""make-tiny: reproducible bytes, complete and readable splits, held-out pairs, the tokenizer, the command."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from data_tools.cli import main
from data_tools.make_tiny.captions import word
from data_tools.make_tiny.command import TinyOptions, make_tiny
from data_tools.make_tiny.languages import LANGUAGES, SHARES
from data_tools.make_tiny.scenes import plan_scene
from data_tools.make_tiny.shards import plan_training, sample_random
from data_tools.make_tiny.vocabulary import CLASS_INDEX, CLASS_NAMES, COLORS, HELD_OUT, SEEN, SHAPES
from siglip_train.errors import UserError

from .conftest import OPTIONS, SPLITS, read_split

SMALL = TinyOptions(samples=24, validation_samples=8, samples_per_class=1, referring_samples=4)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_bytes_do_not_depend_on_workers_or_folder(tmp_path):
    make_tiny(tmp_path / "one", SMALL, workers=1)
    make_tiny(tmp_path / "elsewhere" / "three", SMALL, workers=3)
    one = _digests(tmp_path / "one")
    assert one == _digests(tmp_path / "elsewhere" / "three")
    assert {name.split("/")[0] for name in one} == {
        *SPLITS, "tokenizer.model", "preview.png", "dataset.json",
    }  # fmt: skip
    assert not list(tmp_path.glob(".*")), "scratch folders left behind"


def test_seed_changes_the_pictures(tiny_dir, tmp_path):
    make_tiny(
        tmp_path / "other",
        TinyOptions(samples=24, validation_samples=8, samples_per_class=1, referring_samples=4, seed=7),
    )
    first = _digests(tmp_path / "other")["train/00000.tar"]
    assert first not in _digests(tiny_dir).values()


def test_a_larger_set_begins_with_the_smaller(splits, tmp_path):
    """So figures of runs with different --samples are comparable."""
    make_tiny(tmp_path / "small", SMALL)
    small = read_split(tmp_path / "small" / "train")
    assert len(small) == SMALL.samples
    assert small == splits["train"][: SMALL.samples]


def test_splits_are_complete(splits):
    assert {split: len(samples) for split, samples in splits.items()} == OPTIONS.split_sizes()
    for split, samples in splits.items():
        for sample in samples:
            extensions = set(sample.members)
            assert len(extensions & {"jpg", "png", "webp"}) == 1, sample.key
            assert {"txt", "json", "mask.png"} <= extensions
            assert ("cls" in extensions) == split.startswith("classes")


def test_every_picture_opens_and_is_varied(splits):
    encodings, sizes = Counter(), Counter()
    for sample in (sample for samples in splits.values() for sample in samples):
        extension = next(name for name in ("jpg", "png", "webp") if name in sample.members)
        picture = Image.open(io.BytesIO(sample.members[extension]))
        picture.load()
        assert picture.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
        assert picture.size == (sample.facts["width"], sample.facts["height"])
        assert min(picture.size) >= 64
        assert max(picture.size) <= 160
        encodings[extension] += 1
        sizes[picture.size] += 1
    assert encodings["jpg"] > 4 * (encodings["png"] + encodings["webp"])
    assert min(encodings.values()) > 5
    assert len(sizes) > 100


def test_masks_and_pictures_agree_with_the_boxes(splits):
    for sample in splits["train"][:200]:
        facts = sample.facts
        classes = np.asarray(Image.open(io.BytesIO(sample.members["mask.png"])))
        assert classes.shape == (facts["height"], facts["width"])
        assert set(np.unique(classes)) == {0} | {CLASS_INDEX[item["label"]] + 1 for item in facts["objects"]}
        for item in facts["objects"]:
            left, top, right, bottom = (
                round(edge * side)
                for edge, side in zip(item["box"], (facts["width"], facts["height"]) * 2, strict=True)
            )
            inside = classes[top:bottom, left:right] == CLASS_INDEX[item["label"]] + 1
            # tight on all four sides: the box is of what is seen
            assert inside[0].any(), (sample.key, item)
            assert inside[-1].any(), (sample.key, item)
            assert inside[:, 0].any(), (sample.key, item)
            assert inside[:, -1].any(), (sample.key, item)
            classes = classes.copy()
            classes[top:bottom, left:right] = 0
        assert not classes.any(), "something is drawn outside of every box"


def test_objects_have_the_colour_they_are_called(splits):
    names, values = list(COLORS), np.array(list(COLORS.values()), dtype=float)
    checked = 0
    for sample in (sample for samples in splits.values() for sample in samples if "png" in sample.members):
        # lossless ones, because chroma subsampling bleeds over edges
        picture = np.asarray(Image.open(io.BytesIO(sample.members["png"])).convert("RGB"), dtype=float)
        classes = np.asarray(Image.open(io.BytesIO(sample.members["mask.png"])))
        for item in sample.facts["objects"]:
            pixels = picture[classes == CLASS_INDEX[item["label"]] + 1]
            nearest = np.abs(values - np.median(pixels, axis=0)).sum(axis=1).argmin()
            assert names[nearest] == item["color"]
            checked += 1
    assert checked > 20


def test_held_out_pairs_are_nowhere_in_training(splits):
    for split in ("train", "validation"):
        for sample in splits[split]:
            assert not {(item["color"], item["shape"]) for item in sample.facts["objects"]} & set(HELD_OUT)
    unseen = {(item["color"], item["shape"]) for s in splits["classes_unseen"] for item in s.facts["objects"]}
    seen = {(item["color"], item["shape"]) for s in splits["classes_seen"] for item in s.facts["objects"]}
    assert unseen == set(HELD_OUT)
    assert seen == set(SEEN)
    assert {color for color, _ in SEEN} == set(COLORS)
    assert {shape for _, shape in SEEN} == set(SHAPES)
    assert len(HELD_OUT) == pytest.approx(len(CLASS_NAMES) / 6, abs=1)


def test_held_out_phrases_are_in_no_caption_of_any_language(splits):
    """Nor inside another phrase, as "green" would be in a Chinese word for turquoise."""
    phrases: dict[str, set[str]] = {language: set() for language in LANGUAGES}
    for color, shape in HELD_OUT:
        for language, grammar in LANGUAGES.items():
            for count in (1, 2, 3, 4):
                phrases[language].add(grammar.group(count, color, shape).casefold())
    for split in ("train", "validation"):
        for sample in splits[split]:
            for language, caption in sample.facts["captions"].items():
                padded = f" {caption.casefold()} "
                hits = [phrase for phrase in phrases[language] if phrase in padded]
                assert not hits, (sample.key, language, caption, hits)


def test_class_files(tiny_dir, splits):
    for split in ("classes_seen", "classes_unseen"):
        names = (tiny_dir / split / "classnames.txt").read_text().splitlines()
        templates = (tiny_dir / split / "templates.txt").read_text().splitlines()
        assert len(names) == len(set(names)) == len(COLORS) * len(SHAPES)
        assert all("{c}" in template for template in templates)
        prompts = {template.replace("{c}", name) for template in templates for name in names}
        for sample in splits[split]:
            facts = sample.facts
            assert names[int(sample.members["cls"])] == facts["objects"][0]["label"]
            assert len(facts["objects"]) == 1
            assert facts["captions"]["en"].split(" on a ")[0] in prompts


def test_captions_of_validation_are_distinct_in_every_language(splits):
    for language in LANGUAGES:
        captions = [sample.facts["captions"][language] for sample in splits["validation"]]
        assert len(set(captions)) == len(captions), language
    contents = [
        tuple(sorted(Counter(item["label"] for item in sample.facts["objects"]).items()))
        for sample in splits["validation"]
    ]
    assert len(set(contents)) == len(contents)


def test_languages_have_their_shares(splits):
    counts = Counter(sample.facts["language"] for sample in splits["train"])
    assert set(counts) == set(LANGUAGES)
    assert counts["en"] / len(splits["train"]) == pytest.approx(SHARES["en"], abs=0.08)
    assert sum(SHARES.values()) == pytest.approx(1)
    for sample in splits["train"]:
        facts = sample.facts
        assert sample.members["txt"].decode() == facts["captions"][facts["language"]]
        assert set(facts["captions"]) == set(LANGUAGES)


def test_tokenizer_round_trips_every_language(tiny_dir, splits):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tiny_dir / "tokenizer.model"))
    assert tokenizer.vocab_size() == OPTIONS.vocab_size
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2)
    assert tokenizer.bos_id() == -1
    for sample in splits["validation"] + splits["classes_unseen"]:
        for caption in sample.facts["captions"].values():
            pieces = tokenizer.encode(caption.lower())
            assert tokenizer.decode(pieces) == caption.lower()
            assert tokenizer.unk_id() not in pieces
            assert len(pieces) < 32
    assert tokenizer.decode(tokenizer.encode("ein ½ \N{SNOWMAN}")) == "ein ½ \N{SNOWMAN}", (
        "bytes spell the rest"
    )


def test_run_again(tmp_path):
    folder = tmp_path / "tiny"
    assert make_tiny(folder, SMALL)
    stamp = (folder / "train" / "00000.tar").stat().st_mtime_ns
    assert not make_tiny(folder, SMALL)
    assert (folder / "train" / "00000.tar").stat().st_mtime_ns == stamp
    changed = TinyOptions(samples=28, validation_samples=8, samples_per_class=1)
    with pytest.raises(UserError, match=r"samples 24.*--force"):
        make_tiny(folder, changed)
    assert make_tiny(folder, changed, force=True)
    assert json.loads((folder / "dataset.json").read_text())["samples"] == 28


def test_force_spares_a_folder_it_did_not_make(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("keep me")
    with pytest.raises(UserError, match="not made by make-tiny"):
        make_tiny(tmp_path, SMALL, force=True)
    assert precious.read_text() == "keep me"


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="tokenizer of 20 pieces"):
        make_tiny(
            tmp_path / "tiny",
            TinyOptions(samples=8, validation_samples=4, samples_per_class=1, vocab_size=20),
        )
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "data_tools", "make-tiny", "tiny", "--samples", "8"]
    command += ["--validation-samples", "4", "--samples-per-class", "1", "--workers", "2"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    first, again, other = run(), run(), run("--seed", "3")
    assert (first.returncode, again.returncode, other.returncode) == (0, 0, 2), first.stderr
    assert "wrote tiny" in first.stdout
    assert "up to date" in again.stdout
    assert other.stderr.startswith("error: ")
    assert len(other.stderr.strip().splitlines()) == 1
    assert run("--samples", "-3").returncode == 2


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["make-tiny", "--help"])
    assert stop.value.code == 0
    assert "example: siglip-data make-tiny" in capsys.readouterr().out


def test_same_description_in_every_language_names_as_many_groups():
    """A coarse check of all grammars at once: different descriptions never share a wording."""
    descriptions = {plan_scene(sample_random(1, "train", index)).description for index in range(1500)}
    for language in LANGUAGES:
        wordings = {word(description, language) for description in descriptions}
        assert len(wordings) == len(descriptions), language


def test_a_folder_that_cannot_be_made_is_said_in_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["make-tiny", str(tmp_path / "file" / "tiny")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path / 'file' / 'tiny'}: ")


def test_scenes_to_refer_to_have_several_objects_no_two_alike_and_the_first_is_of_the_kind_they_are_named_for(
    splits,
):
    unseen = {f"{color} {shape}" for color, shape in HELD_OUT}
    for split in ("referring_seen", "referring_unseen"):
        for sample in splits[split]:
            texts = [region["text"] for region in sample.facts["regions"]]
            assert 2 <= len(set(texts)) == len(texts) <= 4
            assert [text in unseen for text in texts] == [split == "referring_unseen"] + [False] * (
                len(texts) - 1
            )
            assert [region["box"] for region in sample.facts["regions"]] == [
                each["box"] for each in sample.facts["objects"]
            ]


def test_a_share_of_training_scenes_can_have_several_objects_no_two_alike_and_the_others_stay_as_they_are():
    usual = [plan_training(3, index) for index in range(300)]
    more = [plan_training(3, index, 0.5) for index in range(300)]
    all_of_it = [plan_training(3, index, 1.0) for index in range(300)]
    for scene in all_of_it:
        names = [(thing.color, thing.shape) for thing in scene.things]
        assert 2 <= len(set(names)) == len(names) <= 4
        assert set(names) <= set(SEEN)
    several = sum(len(scene.things) > 1 for scene in more)
    # half of them, and three in ten of the others
    assert 165 <= several <= 225
    assert sum(len(scene.things) > 1 for scene in usual) < 120
    assert [plan_training(3, index, 0.0) for index in range(300)] == usual


def test_true_captions_are_true_and_the_scenes_own_are_among_those_that_name_everything(splits):
    assert all("true" not in sample.facts for split in ("train", "classes_seen") for sample in splits[split])
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
    group = re.compile(
        rf"\b({'|'.join(numbers)}) (?:(large|small) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})e?s?\b"
    )
    related = 0
    for sample in [sample for split in ("validation", "referring_seen") for sample in splits[split]]:
        facts, objects = sample.facts, sample.facts["objects"]
        assert set(facts["captions"].values()) <= set(facts["true"]["whole"]), sample.key
        for kind, captions in facts["true"].items():
            english = [text for text in captions if text.isascii() and group.match(text)]
            assert english or kind == "part"
            for text in english:
                named = group.findall(text)
                found = [
                    [each for each in objects if each["shape"] == shape and color in ("", each["color"])]
                    for _, _, color, shape in named
                ]
                assert [len(each) for each in found] == [numbers[number] for number, *_ in named], text
                assert (kind == "whole") == (sum(map(len, found)) == len(objects)), text
                assert facts["background"] in text or "background" not in text
                assert len(objects) == 1 or not any(size for _, size, *_ in named)
                for side, axis, sign in (("left", 0, -1), ("right", 0, 1), ("above", 1, -1), ("below", 1, 1)):
                    if f" {side} " in text:
                        (one,), (other,) = found
                        middles = [each["box"][axis] + each["box"][axis + 2] for each in (one, other)]
                        assert sign * (middles[0] - middles[1]) > 0, text
                        related += 1
    assert related > 20
    pictured = [sample.facts for sample in splits["validation"] if len(sample.facts["objects"]) == 1]
    sizes = [
        [size for size in ("large", "small") if any(f" {size} " in text for text in facts["true"]["whole"])]
        for facts in pictured
    ]
    assert {tuple(each) for each in sizes} == {("large",), ("small",), ()}
