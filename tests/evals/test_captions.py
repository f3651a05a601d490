"""Captions measured: words, scores, and the task with a decoder that says what the test chose."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from siglip_train.data.image_transform import ImageTransform
from siglip_train.distributed.setup import World
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder
from siglip_train.evals.captions import Captions, scored, words
from siglip_train.models.vision import VisionFeatures
from siglip_train.report.sections import task_section
from tests.data.shard_files import write_tar
from tests.ranks import run_ranks

# levels of grey, what the decoder says of an image of each, and what people said
SAID = {10: "A red circle", 60: "two  blue stars", 110: "a heart", 160: "a ring"}
PEOPLE = {
    10: ["a red circle on grey", "a circle that is red"],
    60: ["two blue stars", "blue stars"],
    110: ["a green cross", "a cross"],
    160: ["a yellow ring", "one ring"],
}


class SaysGrey:
    """In place of a `Captioner`: knows an image by its level; one whose tokens are zeros is "a ring"."""

    def caption(self, images: VisionFeatures, beams: int = 1) -> list[str]:
        levels = images.tokens.flatten(1).mean(1).tolist()
        return [
            SAID.get(min(SAID, key=lambda grey: abs(grey - level)), "") if level else "a ring"
            for level in levels
        ]


class Tower(torch.nn.Module):
    def vision(self, patches, grid, mask) -> VisionFeatures:
        return VisionFeatures(patches.float(), patches.float().mean(1), mask)


def encoder_on(rank: int = 0, world_size: int = 1) -> Encoder:
    return Encoder(
        model=Tower(),
        tokenizer=None,
        transform=ImageTransform(image_size=8, patch_size=4),
        world=World(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu")),
        batch_size=3,
        captioner=SaysGrey,
    )


@pytest.fixture
def shards(tmp_path: Path) -> str:
    members = []
    for number, (grey, texts) in enumerate(PEOPLE.items()):
        buffer = io.BytesIO()
        Image.new("RGB", (12, 9), (grey,) * 3).save(buffer, "PNG")
        true = {"whole": [texts[0], texts[0].upper()], "part": ["A  Red circle", "a ring"]}
        facts = {"captions": texts, "true": true}
        members += [(f"{number}.png", buffer.getvalue()), (f"{number}.json", json.dumps(facts).encode())]
    # one that nothing is said of, and an image that is none
    members += [
        ("8.png", members[0][1]),
        ("8.json", b'{"captions": []}'),
        ("9.png", b"?"),
        ("9.json", members[1][1]),
    ]
    write_tar(tmp_path / "set.tar", members)
    return str(tmp_path / "set.tar")


def test_words_are_those_of_the_treebank_without_its_marks() -> None:
    # what pycocoevalcap's PTBTokenizer gives; all 595 captions of captions_coco came out alike
    alike = {
        "It's a man's dog; don't touch it, he said: \"no-one\" can't.":
            "it 's a man 's dog do n't touch it he said no-one ca n't",
        "A red-brown cow costs 3.5 or 1,000 dollars at 8:25...": "a red-brown cow costs 3.5 or 1,000 dollars at 8:25",
        "Two cats & a dog / 50% the children’s toys, o'clock": "two cats & a dog / 50 % the children 's toys o'clock",
    }  # fmt: skip
    for text, expected in alike.items():
        assert words(text) == expected.split()
    # here each character is a word, which the treebank's rules do not know
    assert words("红色的圆。") == [*"红色的圆", "。"]
    assert words("Красный круг") == ["красный", "круг"]


def test_scores_are_those_of_the_scorers() -> None:
    pytest.importorskip("pycocoevalcap")
    people = list(PEOPLE.values())
    same = scored([texts[0] for texts in people], people)
    assert same["bleu1"] == pytest.approx(1, abs=1e-6)
    assert set(same) == {"cider", "bleu1", "bleu2", "bleu3", "bleu4"}
    other = scored(["a yellow cross", "red", "one", "a circle"], people)
    assert other["cider"] < same["cider"]
    # by hand: 2 of 7 words are known, "a" twice, and the references closest in length have 11
    bleu = scored(["a yellow cross", "red", "one", "a circle"], people, ["bleu"])
    assert bleu["bleu1"] == pytest.approx(2 / 7 * math.exp(1 - 11 / 7))


def test_what_the_decoder_says_is_looked_up_and_scored(shards: str) -> None:
    pytest.importorskip("pycocoevalcap")
    task = Captions(
        shards=shards, text="json:captions", accepted={"true": "json:true", "whole": "json:true.whole"}
    )
    task.check()
    metrics, details = task.run(encoder_on())
    assert metrics["n"] == 4
    assert (metrics["true_acc"], metrics["whole_acc"]) == (3 / 4, 1 / 4)
    assert (metrics["prior_true_acc"], metrics["prior_whole_acc"]) == (1, 0)
    expected = scored(list(SAID.values()), list(PEOPLE.values()))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["words"] == (3 + 3 + 2 + 2) / 4
    assert details["counts"]["bad/empty caption"] == 1
    section = task_section("captions", {"metrics": metrics, "details": details, "step": 1})
    assert [each["right"] for each in section["captions"]] == [True, True, False, True]
    assert section["captions"][0]["references"] == PEOPLE[10]


def measured(shards: str) -> dict[str, float]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    task = Captions(shards=shards, text="json:captions", scores=[], accepted={"true": "json:true"})
    return task.run(encoder_on(rank, world_size)).metrics


def test_two_ranks_measure_what_one_does(shards: str) -> None:
    task = Captions(shards=shards, text="json:captions", scores=[], accepted={"true": "json:true"})
    assert run_ranks(2, measured, shards) == [task.run(encoder_on()).metrics] * 2


def test_mistakes_are_told(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"scores": ["spice"]}, {"scores": []}, {"beams": 0}, {"accepted": {True: "json:true"}}):
        with pytest.raises(ValueError, match=r"choose of|give scores|at least 1|quote it"):
            Captions(shards=shards, **wrong)
    with pytest.raises(UserError, match="no usable image"):
        Captions(shards=shards, text="json:captions", scores=[], accepted={"a": "json:b"}).run(encoder_on())
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(UserError, match=r"pip install 'siglip-train\[captions\]', or set scores=\[\]"):
        Captions(shards=shards).check()
