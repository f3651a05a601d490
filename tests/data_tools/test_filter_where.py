"""Rules of the form FIELD OP VALUE, case by case."""

import json

import pytest

from data_tools.filter.where import Where
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import UserError

FACTS = {
    "width": 320, "score": "0.31", "lang": "de", "date": "2021-03-04", "ok": True, "none": None, "login": "x",
    "names": {"de": "rote Katze", "en": "red cat"}, "objects": [{"label": "dog"}, {"label": "tree"}], "n": [1, 5],
}  # fmt: skip
SAMPLE = RawSample(
    "a.tar", "k", {"txt": b" A cat = animal\n", "cls": b"7", "json": json.dumps(FACTS).encode()}
)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("json:width >= 320", True),
        ("json:width>320", False),
        ("json:width < 1e3", True),
        ("json:width != 320", False),
        ("json:width == 320.0", True),
        ("json:score > 0.3", True),  # numbers in text, as in tables
        ("json:score == 0.31", True),
        ("json:lang == de", True),
        ('json:lang == "de"', True),
        ("json:lang == 'de'", True),
        ("json:lang in en, de", True),
        ("json:lang in [en,fr]", False),
        ("json:width in 320,640", True),
        ("json:login == x", True),  # the letters "in" are no operator
        ("json:lang > 5", False),  # no number
        ("json:date >= 2021-01-01", True),
        ("json:date < 2021-01-01", False),
        ("json:ok == true", True),
        ("json:ok == 1", False),
        ("json:ok != false", True),
        ("json:none == null", True),
        ("json:missing == 1", False),
        ("json:missing != 1", True),
        ("json:missing < 1", False),
        ("json:missing ~ .", False),
        ("json:missing !~ .", True),
        ("json:names.de ~ ^rot", True),
        ("json:names.* ~ \\bcat\\b", True),
        ("json:names.* !~ Katze", False),
        ("json:objects.*.label == tree", True),
        ("json:objects.*.label != tree", False),  # one of them is
        ("json:n > 4", True),
        ("json:n > 5", False),
        ("cls == 7", True),
        ("txt ~ = animal$", True),
        ("txt !~ ~", True),
        ("txt ~ CAT", False),
        ("txt ~ (?i)CAT", True),
    ],
)
def test_rule(rule: str, expected: bool) -> None:
    assert Where.parse(rule).holds(SAMPLE) is expected


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "json:width",
        "json:width 3",
        "json:a = 3",
        "== 3",
        "json:loginx",
        "a in",
        "a ==",
        "a >> 3",
        "a => 3",
        "a === 3",
        "a <> 3",
    ],
)
def test_what_is_no_rule_is_said(rule: str) -> None:
    with pytest.raises(UserError, match="write FIELD OP VALUE"):
        Where.parse(rule)
