"""Held-out parts by key: disjoint, complete, of the wanted size, and groups kept together."""

import pytest

from siglip_train.data.shards.select import Selection, as_selection

KEYS = [
    f"{style}_{code:05x}_{language}"
    for style in ("noto", "twemoji")
    for code in range(1000)
    for language in ("en", "de")
]


def test_the_parts_are_disjoint_and_complete() -> None:
    train, held_out = (Selection(held_out=0.2, part=part) for part in ("train", "held_out"))
    assert all((key in train) != (key in held_out) for key in KEYS)
    assert sum(key in held_out for key in KEYS) == pytest.approx(0.2 * len(KEYS), rel=0.1)


def test_a_group_is_not_torn_apart() -> None:
    held_out = Selection(held_out=0.3, by="^(.*)_[a-z]+$", part="held_out")
    drawings: dict[str, set[bool]] = {}
    for key in KEYS:
        drawings.setdefault(key.rsplit("_", 1)[0], set()).add(key in held_out)
    assert all(len(parts) == 1 for parts in drawings.values())
    assert sum(parts == {True} for parts in drawings.values()) == pytest.approx(0.3 * len(drawings), rel=0.1)


def test_keys_narrow_both_parts_and_nothing_is_held_out_by_default() -> None:
    assert [key for key in KEYS if key in Selection(keys="_en$")] == [
        key for key in KEYS if key.endswith("_en")
    ]
    assert all(key in Selection() for key in KEYS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"held_out": 1.0}, "held_out"),
        ({"keys": "("}, "keys is not a regular expression"),
        ({"by": "no group"}, "by must have one group"),
        ({"part": "test"}, "part must be"),
    ],
)
def test_a_wrong_selection_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_selection(fields)
