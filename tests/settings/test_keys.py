"""`--keys`: every key of both commands is there, with a default that is true and a meaning."""

import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from siglip_train import evaluate, train
from siglip_train.composition import defaults_of
from siglip_train.config import Config
from siglip_train.evaluate import EvaluateConfig
from siglip_train.settings.keys import Key, classes_of, keys_of, meanings_of
from tests.conftest import ROOT

CONFIGS = [Config, EvaluateConfig]


@dataclass
class Inner:
    """One of several.

    Words before, and then size: is no key here. width, size: of a thing (`a.b: c`); or none. Not a key: this.

    Raises ValueError, in a paragraph of its own.
    """

    size: int
    width: float | None = None


@dataclass
class Outer:
    """All.

    many: by name. Raises nothing.
    """

    one: Inner | None = None
    many: dict[str, Inner] = field(default_factory=dict)
    row: list[Inner] = field(default_factory=list)


def test_a_meaning_goes_on_to_the_next_key_or_to_the_end_of_the_paragraph() -> None:
    meaning = "of a thing (`a.b: c`); or none. Not a key: this."
    assert meanings_of(Inner) == {"width": meaning, "size": meaning}
    assert meanings_of(Outer) == {"many": "by name."}


def test_groups_come_before_what_is_in_them() -> None:
    paths = [key.path for key in keys_of(Outer)]
    assert paths == [
        "one", "one.size", "one.width",
        "many.NAME", "many.NAME.size", "many.NAME.width",
        "row[]", "row[].size", "row[].width",
    ]  # fmt: skip


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_key_has_a_meaning(config_class: type) -> None:
    """A key without one is described in the docstring of its class: `key: meaning.`"""
    assert [key.path for key in keys_of(config_class) if not key.meaning] == []


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_key_that_hydra_knows_is_there_with_its_default(config_class: type) -> None:
    keys = {key.path: key for key in keys_of(config_class)}

    def check(values: dict[str, Any], path: str) -> None:
        for name, value in values.items():
            where = f"{path}{name}"
            if isinstance(value, dict) and value:
                check(value, f"{where}.")
            elif where in keys:
                written = keys[where].default or ""
                plain = list(value) if isinstance(value, tuple) else value
                assert written == str(plain) or yaml.safe_load(written) == plain, where
            else:
                assert {f"{where}.NAME", f"{where}[]"} & keys.keys()

    check(defaults_of(config_class), "")


def test_open_groups_list_the_classes_of_this_project() -> None:
    assert {found.__name__ for found in classes_of("objectives")} >= {"SigmoidLoss", "Classification"}
    assert {found.__name__ for found in classes_of("evaluation.tasks")} >= {
        "HeadAccuracy", "Probes", "Retrieval", "ValidationLoss", "ZeroShotClassification",
    }  # fmt: skip
    keys = list(keys_of(Config))
    head = "siglip_train.objectives.classification.Classification"
    assert Key("objectives.NAME._target_", head, "", keys_of_path(keys, head)) in keys
    assert any(key.path == "objectives.NAME.classes" and key.default == "???" for key in keys)


def keys_of_path(keys: list[Key], default: str) -> str:
    return next(key.meaning for key in keys if key.default == default)


def printed(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str
) -> str:
    monkeypatch.setattr(sys, "argv", ["siglip", *arguments])
    monkeypatch.setenv("COLUMNS", "100")
    command.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_help_points_to_them(name: str) -> None:
    assert "--keys [PREFIX]" in (ROOT / "conf" / f"{name}.yaml").read_text()


def test_the_command_prints_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    everything = printed(train, monkeypatch, capsys, "--keys")
    assert everything.startswith("model\n")
    assert "data.sources.NAME.shards = null\n    path, folder, brace list" in everything
    optim = printed(train, monkeypatch, capsys, "--keys", "optim.")
    assert "\noptim.schedule = cosine   (cosine, linear, constant)\n    how it then falls" in optim
    assert "engine" not in optim
    mine = printed(train, monkeypatch, capsys, "--keys", "data.sources.mine.w")
    assert mine.startswith("data.sources.NAME.weight = 1.0   (number)\n")
    assert "tasks.NAME.gallery" in printed(evaluate, monkeypatch, capsys, "--keys", "tasks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--keys", "optim.lrr"], "did you mean optim.lr?"), (["--keys", "a", "b"], "takes one beginning")],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["siglip-train", *arguments])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
