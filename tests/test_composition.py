"""From plain mappings to dataclasses: every wrong key and type is named with its path."""

from dataclasses import dataclass, field
from typing import Any, Literal

import omegaconf
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from siglip_train.composition import defaults_of, instantiate, instantiate_all, plain, readable
from siglip_train.errors import UserError
from siglip_train.typed import build


@dataclass
class Inner:
    size: int = 3
    kind: Literal["a", "b"] = "a"


@dataclass
class Outer:
    needed: float
    inner: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)
    rules: list[Inner] = field(default_factory=list)
    pair: tuple[float, float] = (0.0, 1.0)
    maybe: str | None = None
    flag: bool = False
    free: Any = None


def test_values_arrive_with_their_types() -> None:
    built = build(
        Outer,
        {
            "needed": "1e-3",
            "many": {"x": {"kind": "b"}},
            "rules": [{"size": 5}],
            "pair": [1, 2],
            "free": {"y": 1},
        },
    )
    assert built == Outer(
        0.001, many={"x": Inner(kind="b")}, rules=[Inner(5)], pair=(1.0, 2.0), free={"y": 1}
    )


def test_a_whole_float_is_an_integer_where_one_is_expected() -> None:
    inner = build(Outer, {"needed": 1, "inner": {"size": 4e8}}).inner
    assert (inner.size, type(inner.size)) == (400_000_000, int)


def test_a_mapping_set_to_null_is_empty() -> None:
    assert build(Outer, {"needed": 1, "many": None}).many == {}


def test_defaults_and_back() -> None:
    values = defaults_of(Outer)
    assert values["needed"] == "???"
    assert build(Outer, {**values, "needed": 1}) == Outer(1.0)


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    # YAML reads them as text where no point is in them
    assert [build(Inner, {"size": size}).size for size in ("4e8", "1.5e+3", 2e3)] == [4 * 10**8, 1500, 2000]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"needed": 1, "inner": {"size": "1.5e0"}}, "inner.size: expected int"),
        ({}, "needed: a value is required"),
        ({"needed": "???"}, "needed: a value is required"),
        ({"needed": 1, "iner": {}}, "iner: no such key, did you mean inner?"),
        ({"needed": 1, "inner": {"sise": 1}}, "inner.sise: no such key, did you mean size?"),
        ({"needed": 1, "inner": 5}, "inner: expected a group of keys, got 5"),
        ({"needed": 1, "inner": {"size": True}}, "inner.size: expected int, got True"),
        ({"needed": 1, "inner": {"kind": "c"}}, "inner.kind: 'c' is not one of 'a', 'b'"),
        ({"needed": 1, "many": {"x": {"size": "big"}}}, "many.x.size: expected int, got 'big'"),
        ({"needed": 1, "rules": [{}, {"size": 0.5}]}, "rules[1].size: expected int, got 0.5"),
        ({"needed": 1, "inner": {"size": float("inf")}}, "inner.size: expected int, got inf"),
        ({"needed": 1, "many": 5}, "many: expected a mapping, got 5"),
        ({"needed": 1, "pair": [1]}, "pair: expected a list of 2, got [1]"),
        ({"needed": 1, "maybe": 3}, "maybe: expected str, got 3"),
        ({"needed": 1, "flag": "yes"}, "flag: expected bool, got 'yes'"),
        ({"needed": True}, "needed: expected float, got True"),
    ],
)
def test_mistakes_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError) as raised:
        build(Outer, values)
    assert message in str(raised.value)


def test_targets() -> None:
    made = instantiate_all({"one": {"_target_": "fractions.Fraction", "numerator": 3}, "none": None}, "tasks")
    assert made["one"] == 3
    assert list(made) == ["one"]
    for node, message in (
        ({"numerator": 3}, "tasks.x: has no _target_"),
        ({"_target_": "fractions.Fractoin"}, "tasks.x: "),
        ({"_target_": "fractions.Fraction", "numerator": "???"}, "tasks.x.numerator: a value is required"),
        ({"_target_": "fractions.Fraction", "colour": 1}, "colour"),
    ):
        with pytest.raises(UserError) as raised:
            instantiate(node, "tasks.x")
        assert message in str(raised.value)


@pytest.mark.parametrize(
    "value",
    [
        *("runs/epoch=9", "runs/é", "runs/a#b", "日本", "a;b", "it's", r"it\'é", "é\\", "x y=z", "~/runs"),
        *("/data/{000..041}.tar", "https://host/a.tar?x=1&y=2"),
    ],
)
def test_values_that_hydra_cannot_read_are_quoted(value: str) -> None:
    parse = OverridesParser.create().parse_override
    with pytest.raises(HydraException):
        parse(f"run_dir={value}")
    assert parse(readable(f"run_dir={value}")).value() == value
    assert parse(readable(f"++data.sources.a.shards={value}")).key_or_group == "data.sources.a.shards"


@pytest.mark.parametrize(
    "argument",
    [
        "a=1",
        "a=[1,2]",
        "a={b: 1}",
        'a="é"',
        "a='é'",
        "~a.b",
        "--cfg",
        "job",
        "a=/x/*.tar",
        r"a={json\:b: 1}",
        "a=a,b",
        "a=",
    ],
)
def test_what_hydra_reads_stays_as_it_is(argument: str) -> None:
    assert readable(argument) == argument


@pytest.mark.parametrize("value", ["[1,2", "{a", "'x", '"x'])
def test_what_cannot_be_read_is_named_with_its_remedy(value: str) -> None:
    with pytest.raises(
        UserError, match=r"^data\.x: cannot read the value .*in quotes of its own.*'\+data\.x=\"…\"'$"
    ):
        readable(f"+data.x={value}")


def test_the_home_folder_is_meant_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = omegaconf.OmegaConf.create(
        {"a": "~/x", "b": ["~/y", "z~/"], "c": {"d": "~", "e": "~other", "f": 1}}
    )
    assert plain(config) == {
        "a": "/home/me/x",
        "b": ["/home/me/y", "z~/"],
        "c": {"d": "~", "e": "~other", "f": 1},
    }
