"""Every recipe as it stands: its commands on a stand-in of the store, then what is said to read its data reads them.

Programs that only fetch (wget, hf, npm, git, img2dataset) are not run: `stores.py` leaves what they leave.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore

from data_tools.cli import build_parser, main
from data_tools.recipes.data_sets import RECIPES, Recipe, as_markdown
from siglip_train.composition import defaults_of, instantiate_all, plain
from siglip_train.config import Config
from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import DataConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.pipeline import build_loader
from siglip_train.distributed.setup import World
from siglip_train.evals.base import Encoder, check_all, run_all
from siglip_train.evaluate import EvaluateConfig
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from siglip_train.settings.starting_point import _fill_sources
from siglip_train.train import OPEN_GROUPS
from siglip_train.typed import build
from tests.conftest import ROOT
from tests.data.run_inputs import inputs_of

from .hub import serve
from .stores import STORES

FETCHING = ("wget", "hf", "npm", "git", "img2dataset")
# what a shell line of a recipe begins with
OFFLINE = ("mkdir", "(printf", "unzip", "cd", "for")
# as small as the data; processes that are started would import torch anew each
ONE = ["--workers", "1"]
FEWER = {"tokenizer": ["--vocab-size", "300"], "pack": ONE, "verify": ONE, "filter": ONE}
NAMES = [recipe.name for recipe in RECIPES]


def words(text: str) -> torch.Tensor:
    """Spell the text in bytes, cut or padded to 12."""
    return torch.tensor([*text.encode()[:12], *[0] * 12][:12])


class Bytes:
    """A tokenizer of bytes, for loaders and evaluations."""

    context_length = 12

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([words(text) for text in texts])


def test_there_is_a_store_for_every_recipe() -> None:
    assert STORES.keys() == set(NAMES)
    assert len(NAMES) == len(set(NAMES))


def test_the_readme_has_the_recipes_as_they_are() -> None:
    assert as_markdown() in (ROOT / "data_tools" / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_command_prints_what_a_shell_takes(name: str, capsys: pytest.CaptureFixture) -> None:
    main(["recipes", name])
    text = capsys.readouterr().out
    recipe = next(each for each in RECIPES if each.name == name)
    assert [line for line in text.splitlines() if not line.startswith("# ") and line[:1] != "#"] == [
        command for command in recipe.commands if command[:1] != "#"
    ]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    for fact in (recipe.title, recipe.size, recipe.licence, *recipe.reads):
        assert fact in text


def test_all_are_listed(capsys: pytest.CaptureFixture) -> None:
    main(["recipes"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[::2]] == NAMES
    with pytest.raises(SystemExit):
        main(["recipes", "laion"])
    assert "there is no recipe laion; there are cc3m, cc12m," in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, hub = tmp_path / "place", tmp_path / "hub"
    place.mkdir()
    hub.mkdir()
    STORES[recipe.name](place, hub)
    monkeypatch.chdir(place)
    with serve(hub) as served:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": served.url})
        carry_out(recipe.commands, place)
    for command in recipe.reads:
        read(command)


def carry_out(commands: tuple[str, ...], place: Path) -> None:
    """Run what needs no network; lines for the shell one after another in one of its own."""
    lines: list[str] = []
    for command in commands:
        program, *arguments = shlex.split(command, comments=True) or ["#"]
        if program == "siglip-data":
            in_a_shell(lines, place)
            main([*arguments, *FEWER.get(arguments[0], [])])
        elif program in OFFLINE or program.startswith("("):
            lines.append(command)
        else:
            assert program in (*FETCHING, "#"), f"{command}: neither run nor known to fetch alone"
    in_a_shell(lines, place)


def in_a_shell(lines: list[str], place: Path) -> None:
    if any("unzip" in line for line in lines) and shutil.which("unzip") is None:
        pytest.skip("unzip is not installed")
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=place, check=True)
    lines.clear()


def read(command: str) -> None:
    program, *overrides = shlex.split(command)
    {"siglip-train": read_in_training, "siglip-eval": read_in_evaluation}[program](overrides)


def composed(name: str, config: type, open_groups: tuple[str, ...], overrides: list[str]) -> dict[str, Any]:
    ConfigStore.instance().store(name=f"{name}_defaults", node=defaults_of(config))
    given = [f"++{each}" if each.startswith(open_groups) else each for each in overrides]
    with initialize_config_module("conf", version_base="1.3"):
        return plain(compose(name, overrides=given))


def read_in_training(overrides: list[str]) -> None:
    """A batch of every source, and the evaluations of the experiment find their files."""
    values = composed("train", Config, OPEN_GROUPS, overrides)
    _fill_sources(values)
    data = {**values["data"], "workers": 0, "shuffle_window": 100, "resize": DataConfig.resize}
    config = build(DataConfig, data)
    loader = build_loader(
        config,
        inputs=inputs_of(config, ImageTransform(16, 8), Bytes()),  # type: ignore[arg-type]
        share=RankShare(4),
        seed=0,
    )
    batch = next(iter(loader))
    assert len(batch.keys) == 4
    for source in values["data"]["sources"].values():
        assert ("texts" in batch.parts) == (source.get("text", "txt") is not None)
    tokenizer = values["tokenizer"]
    assert "PATH" in tokenizer or os.path.exists(tokenizer) or "init_from" in values
    # null is what a run fills from the sources of its data
    tasks = {
        name: {key: value for key, value in task.items() if value is not None}
        for name, task in values["evaluation"]["tasks"].items()
    }
    for task in tasks.values():
        task.setdefault("shards", next(iter(values["data"]["sources"].values()))["shards"])
    check_all(instantiate_all(tasks, "evaluation.tasks"), "evaluation.tasks")


def read_in_evaluation(overrides: list[str]) -> None:
    """The tasks as composed, with a small model of random weights and few resamples."""
    values = composed("evaluate", EvaluateConfig, ("tasks.",), overrides)
    nodes = {name: node for name, node in values["tasks"].items() if node is not None}
    for node in nodes.values():
        node |= {"bootstrap": 0} if "bootstrap" in node else {}
        # 80,000 prompts would take a minute
        node |= {"templates": ["a {}"]} if node.get("templates") == "openai" else {}
        # a penalty chosen on a part of a dozen images means nothing
        node.get("methods", {}).pop("linear", None)
        if "few_shot" in node.get("methods", {}):
            node["methods"]["few_shot"]["shots"] = [1]
    tasks = instantiate_all(nodes, "tasks")
    check_all(tasks, "tasks")
    torch.manual_seed(0)
    size = {"width": 16, "depth": 1, "mlp_dim": 32, "heads": 2}
    vision = VisionConfig(image_size=16, patch_size=8, **size)
    encoder = Encoder(
        model=Siglip(SiglipConfig(vision, TextConfig(context_length=12, vocab_size=256, **size))),
        tokenizer=Bytes(),
        transform=ImageTransform(16, 8),
        world=World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")),
        batch_size=64,
    )
    for evaluation in run_all(tasks, encoder).values():
        assert evaluation.metrics


def test_commands_of_recipes_are_those_that_there_are() -> None:
    parser = build_parser()
    for recipe in RECIPES:
        for command in recipe.commands:
            program, *arguments = shlex.split(command, comments=True) or ["#"]
            if program == "siglip-data":
                parser.parse_args(arguments)
