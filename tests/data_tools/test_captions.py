"""Captions are true of their images (read back from the English) and grammatical (spot forms per language)."""

import re
from collections import Counter

import pytest

from data_tools.make_tiny.captions import Description, Group, word
from data_tools.make_tiny.languages import LANGUAGES
from data_tools.make_tiny.vocabulary import BACKGROUNDS, COLORS, SHAPES

NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}
SINGULAR = {
    **{shape: shape for shape in SHAPES},
    **{f"{shape}s": shape for shape in SHAPES},
    "crosses": "cross",
}
GROUP = rf"(a|two|three|four) (?:(large|small) )?({'|'.join(COLORS)}) ({'|'.join(SINGULAR)})"
RELATION = r"to the left of|to the right of|above|below"


def _parse(caption: str) -> tuple[Counter, str | None, str | None, str | None]:
    """(objects by label, size, relation, background) of an English caption; fails on anything left over."""
    background = re.search(rf" on a ({'|'.join(BACKGROUNDS)}) background$", caption)
    caption = caption[: background.start()] if background else caption
    relation = re.search(RELATION, caption)
    objects: Counter = Counter()
    size = None
    for phrase in re.split(rf", | and | (?:{RELATION}) ", caption):
        match = re.fullmatch(GROUP, phrase)
        assert match, f"cannot read {phrase!r} of {caption!r}"
        objects[f"{match[3]} {SINGULAR[match[4]]}"] += NUMBERS[match[1]]
        assert (match[1] == "a") == (match[4] in SHAPES), "number agrees"
        size = size or match[2]
    return objects, size, relation and relation[0], background and background[1]


def _is_true(relation: str, first: list[float], second: list[float]) -> bool:
    return {
        "to the left of": first[2] <= second[0],
        "to the right of": first[0] >= second[2],
        "above": first[3] <= second[1],
        "below": first[1] >= second[3],
    }[relation]


def test_english_captions_are_true(splits):
    patterns: Counter = Counter()
    for sample in splits["train"] + splits["validation"]:
        facts = sample.facts
        caption = facts["captions"]["en"]
        alone = re.fullmatch(rf"an? ({'|'.join(SHAPES)})", caption)
        if alone:
            assert [item["shape"] for item in facts["objects"]] == [alone[1]], caption
            assert caption.startswith("an " if alone[1] == "arrow" else "a "), caption
            patterns["shape alone"] += 1
            continue
        objects, size, relation, background = _parse(caption)
        assert objects == Counter(item["label"] for item in facts["objects"]), caption
        boxes = {item["label"]: item["box"] for item in facts["objects"]}
        if relation:
            first, second = caption.split(f" {relation} ")
            assert _is_true(relation, boxes[first.removeprefix("a ")], boxes[second.removeprefix("a ")]), (
                caption
            )
        if background:
            assert background == facts["background"]
        if size:
            left, top, right, bottom = next(iter(boxes.values()))
            extent = max((right - left) * facts["width"], (bottom - top) * facts["height"])
            share = extent / min(facts["width"], facts["height"])
            assert (share > 0.8) if size == "large" else (share < 0.6), (caption, share)
        patterns.update(
            {
                "relation": bool(relation), "size": bool(size), "background": bool(background),
                "count": max(objects.values()) > 1, "several": len(objects) > 1, "single": sum(objects.values()) == 1,
            }
        )  # fmt: skip
    assert min(patterns.values()) > 20, patterns


def test_objects_do_not_overlap(splits):
    for sample in splits["train"]:
        boxes = [item["box"] for item in sample.facts["objects"]]
        for index, first in enumerate(boxes):
            for second in boxes[index + 1 :]:
                assert any(_is_true(relation, first, second) for relation in RELATION.split("|")), sample.key


def test_all_relations_occur(splits):
    said = Counter(
        match[0]
        for sample in splits["train"]
        if (match := re.search(RELATION, sample.facts["captions"]["en"]))
    )
    assert set(said) == set(RELATION.split("|"))


SINGLE = {
    "en": "a small blue star",
    "de": "ein kleiner blauer Stern",
    "zh": "一个蓝色的小五角星",
    "ar": "نجمة زرقاء صغيرة",
    "es": "una estrella azul pequeña",
    "ru": "маленькая синяя звезда",
    "hi": "एक छोटा नीला तारा",
    "ja": "小さな青い星",
}
COUNTED = {
    "en": "two red hearts and three yellow stars on a grey background",
    "de": "zwei rote Herzen und drei gelbe Sterne auf grauem Hintergrund",
    "zh": "灰色背景上的两个红色的心形和三个黄色的五角星",
    "ar": "قلبان أحمران وثلاث نجمات صفراء على خلفية رمادية",
    "es": "dos corazones rojos y tres estrellas amarillas sobre un fondo gris",
    "ru": "два красных сердца и три жёлтые звезды на сером фоне",
    "hi": "स्लेटी पृष्ठभूमि पर दो लाल दिल और तीन पीले तारे",
    "ja": "灰色の背景に二つの赤いハートと三つの黄色い星",
}
LISTED = {
    "en": "a green cross, a brown arrow and four pink circles",
    "de": "ein grünes Kreuz, ein brauner Pfeil und vier rosafarbene Kreise",
    "zh": "一个绿色的十字、一个棕色的箭头和四个粉色的圆形",
    "ar": "صليب أخضر وسهم بني وأربع دوائر وردية",
    "es": "una cruz verde, una flecha marrón y cuatro círculos rosas",
    "ru": "зелёный крест, коричневая стрелка и четыре розовых круга",
    "hi": "एक हरा क्रॉस, एक भूरा तीर और चार गुलाबी वृत्त",
    "ja": "緑色の十字と茶色い矢印と四つのピンク色の円",
}
ABOVE = {
    "en": "a purple diamond above a blue ring",
    "de": "eine violette Raute oberhalb von einem blauen Ring",
    "zh": "一个紫色的菱形在一个蓝色的圆环的上方",
    "ar": "معين بنفسجي فوق حلقة زرقاء",
    "es": "un rombo morado encima de un anillo azul",
    "ru": "фиолетовый ромб над синим кольцом",
    "hi": "एक नीले छल्ले के ऊपर एक बैंगनी समचतुर्भुज",
    "ja": "青い輪の上にある紫色のひし形",
}
LEFT = {
    "en": "a turquoise triangle to the left of a blue star",
    "de": "ein türkisfarbenes Dreieck links von einem blauen Stern",
    "zh": "一个青色的三角形在一个蓝色的五角星的左边",
    "ar": "مثلث فيروزي إلى يسار نجمة زرقاء",
    "es": "un triángulo turquesa a la izquierda de una estrella azul",
    "ru": "бирюзовый треугольник слева от синей звезды",
    "hi": "एक नीले तारे के बाईं ओर एक फ़िरोज़ी त्रिभुज",
    "ja": "青い星の左にあるターコイズ色の三角形",
}
ALONE = {
    "en": "a star", "de": "ein Stern", "zh": "一个五角星", "ar": "نجمة", "es": "una estrella", "ru": "звезда",
    "hi": "एक तारा", "ja": "星",
}  # fmt: skip
CASES = {
    "single": (Description((Group(1, "blue", "star"),), size="small"), SINGLE),
    "counted": (
        Description((Group(2, "red", "heart"), Group(3, "yellow", "star")), background="grey"), COUNTED,
    ),
    "listed": (
        Description((Group(1, "green", "cross"), Group(1, "brown", "arrow"), Group(4, "pink", "circle"))), LISTED,
    ),
    "above": (Description((Group(1, "purple", "diamond"), Group(1, "blue", "ring")), relation="above"), ABOVE),
    "left": (Description((Group(1, "turquoise", "triangle"), Group(1, "blue", "star")), relation="left"), LEFT),
    "alone": (Description((Group(1, "red", "star"),), shape_alone=True), ALONE),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_wording(case, language):
    description, expected = CASES[case]
    assert word(description, language) == expected[language]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_word_table_is_complete(language):
    for color in COLORS:
        for shape in SHAPES:
            for count in (1, 2, 3, 4):
                assert LANGUAGES[language].group(count, color, shape)
            for relation in ("left", "right", "above", "below"):
                assert LANGUAGES[language].relate((color, shape), relation, ("red", shape))
    for background in BACKGROUNDS:
        assert LANGUAGES[language].on_background("x", background) != "x"
    for size in ("large", "small"):
        phrases = {LANGUAGES[language].group(1, "red", shape, size) for shape in SHAPES}
        assert len(phrases) == len(SHAPES)
