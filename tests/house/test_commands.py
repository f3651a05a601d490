"""Every command that is shown composes, and trains the model that it names."""

import re

import pytest

from data_tools import cli
from siglip_train import convert
from siglip_train.models.published import likeness
from siglip_train.train import OPEN_GROUPS
from siglip_train.typed import REQUIRED, build
from tests.composing import CONFIGS, composed, filled, names, on_meta, sizes
from tests.house.commands import Command, of_headers, of_readmes, readmes
from tests.models.test_sizes import size

COMMANDS = list(dict.fromkeys([*of_readmes(), *of_headers()]))
# of siglip_train, those whose README shows commands
PARTS = ("data", "distributed", "evals", "interop")
# with or without the time before it
# a line of its own, or a cell of a table
PRINTED = r"(?:^|\| )(?:[\d:]{8} )?([^|\n]* M parameters, as [^|\n]*?)(?: \||$)"
OPEN = {"train": OPEN_GROUPS, "evaluate": ("tasks.",)}


def opened(command: Command) -> list[str]:
    """As the programs hand them to Hydra: some groups take names of the user's."""
    groups = OPEN[command.program]
    return [f"++{word}" if word.startswith(groups) else word for word in command.overrides]


def test_there_are_commands_of_every_kind() -> None:
    files = {command.file for command in COMMANDS}
    for name in ("", "conf/", "data_tools/", *(f"siglip_train/{part}/" for part in PARTS)):
        assert f"{name}README.md" in files
    assert {command.program for command in COMMANDS} == {"train", "evaluate", "convert", "data"}
    assert len([command for command in COMMANDS if command.file == "README.md"]) >= 7


COMPOSED = [command for command in COMMANDS if command.program in CONFIGS]
PARSERS = {"convert": convert.build_parser, "data": cli.build_parser}
PARSED = [command for command in COMMANDS if command.program in PARSERS]


@pytest.mark.parametrize("command", PARSED, ids=str)
def test_a_shown_command_is_what_its_program_takes(command: Command) -> None:
    PARSERS[command.program]().parse_args(command.overrides)


@pytest.mark.parametrize("command", COMPOSED, ids=str)
def test_a_shown_command_composes_and_its_types_are_right(command: Command) -> None:
    is_training = command.program == "train"
    values = filled(*opened(command)) if is_training else composed(*opened(command), program="evaluate")
    given = {key: "any" if value == REQUIRED else value for key, value in values.items()}
    for key in ("global_batch_size", "total_samples"):
        if given.get(key) == "any":
            given[key] = 1
    build(CONFIGS[command.program], given)


TRAINING = [command for command in COMMANDS if command.program == "train"]


@pytest.mark.parametrize("command", TRAINING, ids=str)
def test_a_shown_command_trains_the_model_it_names(command: Command) -> None:
    """The chosen file's sizes, but for what the command itself sets: nothing an experiment says lies over them."""
    chosen = next((word for word in command.overrides if word.startswith("model=")), None)
    experiment = next((word for word in command.overrides if word.startswith("experiment=")), None)
    sizes = [word for word in command.overrides if word.startswith("model.")]
    alone = [word for word in (chosen or experiment,) if word is not None]
    assert composed(*opened(command))["model"] == composed(*alone, *sizes)["model"]


def test_sizes_that_a_readme_shows_in_the_words_of_the_log_are_those_of_the_models() -> None:
    said = {}
    for name in names("model"):
        title, note = likeness(sizes(f"model={name}"))
        said[f"{title}: {size(on_meta(name)) / 1e6:.1f} M parameters, {note}"] = name
    shown = [line for file in readmes() for line in re.findall(PRINTED, file.read_text(), re.MULTILINE)]
    assert shown, "README shows what a run prints"
    for line in shown:
        assert line in said
