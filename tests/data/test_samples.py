"""Fields, caption choice, causes."""

import json
from collections import Counter

import numpy as np
import pytest

from siglip_train.data.shards.fields import CaptionChoice, Field
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import SampleError, UserError

CONTENT = {
    "name": "a cat",
    "empty": " ",
    "number": 3,
    "names": {"de": "Katze", "fr": "chat", "es": ""},
    "list": ["one", "", "two"],
    "boxes": [{"label": "cat"}, {"label": "dog"}, {"other": 1}],
}


def _sample(**members: bytes) -> RawSample:
    content = {"txt": b"  plain text\n", "json": json.dumps(CONTENT).encode(), **members}
    return RawSample("0.tar", "key", content)


@pytest.mark.parametrize(
    ("field", "texts"),
    [
        ("txt", [("", "plain text")]),
        ("json:name", [("", "a cat")]),
        ("json:names.de", [("", "Katze")]),
        ("json:names", [("de", "Katze"), ("fr", "chat")]),
        ("json:names.*", [("de", "Katze"), ("fr", "chat")]),
        ("json:list", [("", "one"), ("", "two")]),
        ("json:list.*", [("", "one"), ("", "two")]),
        ("json:boxes.*.label", [("", "cat"), ("", "dog")]),
        ("json:empty", []),
        ("json:number", []),
        ("json:nowhere.at.all", []),
        ("cls", []),
    ],
)
def test_fields(field: str, texts: list[tuple[str, str]]):
    assert Field.parse(field).texts(_sample()) == texts


def test_first_value_of_a_field():
    assert Field.parse("json:number").first(_sample()) == 3
    assert Field.parse("json:nowhere").first(_sample()) is None


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"txt": "ä".encode("latin-1")}, "not utf-8"),
        ({"json": b'{"name": "\xe4"}'}, "not utf-8"),
        ({"json": b'{"name": '}, "broken json"),
        ({"txt": b" \n", "json": b"{}"}, "empty caption"),
        ({"txt": bytes(20) + b"\n", "json": b"{}"}, "empty caption"),
        ({"txt": b"", "json": b"[1, 2]"}, "empty caption"),
        ({"txt": b"", "json": b'{"name": null}'}, "empty caption"),
        ({"txt": b"", "json": b'{"name": [[], 42]}'}, "caption is no text"),
        ({"txt": b"", "json": b'{"name": {"en": false}}'}, "caption is no text"),
    ],
    ids=str,
)
def test_a_sample_without_a_usable_caption_has_a_cause(members: dict[str, bytes], cause: str):
    # the broken field first, and nothing usable in the other one
    sample = _sample(**{"txt": b"", "json": b"{}", **members})
    for spec in ({"txt": 0.5, "json:name": 0.5}, {"json:name": 0.5, "txt": 0.5}):
        with pytest.raises(SampleError) as caught:
            CaptionChoice(spec).draw(sample, np.random.default_rng(0))
        assert caught.value.cause == cause


def test_a_byte_order_mark_is_no_part_of_a_caption():
    sample = _sample(txt="\ufeffa cat".encode(), json='\ufeff{"name": "a dog"}'.encode())
    assert Field.parse("txt").texts(sample) == [("", "a cat")]
    assert Field.parse("json:name").texts(sample) == [("", "a dog")]


def test_half_a_surrogate_pair_which_no_tokenizer_takes_is_replaced():
    assert Field.parse("json:name").texts(_sample(json=rb'{"name": "a \ud83d"}')) == [("", "a ?")]


def test_of_keys_that_repeat_the_last_counts_and_nan_is_no_caption():
    sample = _sample(json=b'{"name": "one", "name": "two", "empty": NaN}')
    assert Field.parse("json:name").texts(sample) == [("", "two")]
    assert Field.parse("json:empty").texts(sample) == []


@pytest.mark.parametrize("depth", [3000, 100_000])
def test_json_that_nests_deeper_than_python_calls_is_broken(depth: int):
    content = b'{"name": ' + b"[" * depth + b'"x"' + b"]" * depth + b"}"
    with pytest.raises(SampleError, match="broken json"):
        Field.parse("json:name").texts(_sample(json=content))


def _frequencies(spec: str | dict, sample: RawSample, draws: int = 4000) -> dict[str, float]:
    choice = CaptionChoice(spec)
    drawn = Counter(choice.draw(sample, np.random.default_rng(seed)) for seed in range(draws))
    return {text: count / draws for text, count in drawn.items()}


def test_a_mapping_draws_with_its_probabilities():
    found = _frequencies({"txt": 5, "json:name": 2, "json:names.*": 3}, _sample())
    assert found == pytest.approx({"plain text": 0.5, "a cat": 0.2, "Katze": 0.15, "chat": 0.15}, abs=0.03)


def test_an_empty_or_broken_choice_is_drawn_again_among_the_others():
    found = _frequencies({"txt": 0.5, "json:name": 0.1, "json:names": 0.4}, _sample(txt=b" "))
    assert found == pytest.approx({"a cat": 0.2, "Katze": 0.4, "chat": 0.4}, abs=0.03)
    assert _frequencies({"txt": 0.1, "json:name": 0.9}, _sample(json=b"{"), 50) == {"plain text": 1.0}


def test_members_that_can_hold_the_caption():
    assert CaptionChoice({"json:a": 1, "txt": 1, "json:b": 1}).members == ("json", "txt")


@pytest.mark.parametrize("spec", [{}, {"txt": -1, "json:a": 2}, {"txt": 0}, "json:", "json:a..b"])
def test_wrong_specs_are_user_errors(spec: str | dict):
    with pytest.raises(UserError):
        CaptionChoice(spec)
