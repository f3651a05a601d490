"""The `siglip-data` command: a sub-command is a folder whose `command.py` has `add_command`, and a line in `VERBS`."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from data_tools.emoji_table import command as emoji_table_command
from data_tools.filter import command as filter_command
from data_tools.make_tiny import command as make_tiny_command
from data_tools.pack import command as pack_command
from data_tools.preview import command as preview_command
from data_tools.recipes import command as recipes_command
from data_tools.regions import command as regions_command
from data_tools.stats import command as stats_command
from data_tools.tokenizer import command as tokenizer_command
from data_tools.verify import command as verify_command
from siglip_train.errors import UserError, exit_on_user_error

VERBS = (
    make_tiny_command,
    pack_command,
    verify_command,
    stats_command,
    filter_command,
    regions_command,
    preview_command,
    tokenizer_command,
    emoji_table_command,
    recipes_command,
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, which argparse hides below its usage; the parsers of the verbs are such too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help shows what it takes)")


def build_parser() -> argparse.ArgumentParser:
    """The command-line parser with every verb, which raises `UserError`."""
    parser = _Parser(prog="siglip-data", description="Offline tools for image-text shards.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for verb in VERBS:
        verb.add_command(commands)
    return parser


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a `UserError` ends it with a line on stderr and exit status 2."""
    parsed = build_parser().parse_args(arguments)
    parsed.run(parsed)
