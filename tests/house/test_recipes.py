"""Recipes: a model is what `model=` names, whatever the experiment says beside it."""

from pathlib import Path

import pytest
import yaml

from tests.composing import names, on_meta, sizes
from tests.conftest import ROOT
from tests.models.test_sizes import PARAMETERS, millions

EXPERIMENTS, MODELS = names("experiment"), names("model")
EXPERIMENT_FILES = sorted((ROOT / "conf" / "experiment").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENT_FILES, ids=lambda path: path.stem)
def test_an_experiment_may_only_choose_a_model(path: Path) -> None:
    """A body would lie over the `model=` of a command line, and train another model than it names."""
    assert "model" not in (yaml.safe_load(path.read_text()) or {}), "sizes belong into a file of conf/model"


def compare(experiment: str, model: str) -> None:
    assert sizes(f"experiment={experiment}", f"model={model}") == sizes(f"model={model}")
    assert millions(on_meta(model)) == PARAMETERS[model][-1]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_model_of_the_command_line_wins(experiment: str) -> None:
    for model in ("b16", "tiny"):
        compare(experiment, model)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_model_of_the_command_line_wins(experiment: str) -> None:
    for model in MODELS:
        compare(experiment, model)
