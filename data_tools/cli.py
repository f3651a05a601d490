"""The `siglip-data` command: a sub-command is a file with `add_command` and a line in `VERBS`."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from data_tools import (
    emoji_command,
    filter_command,
    make_tiny,
    pack_command,
    preview_command,
    recipes_command,
    stats_command,
    tokenizer_command,
    verify_command,
)
from siglip_train.errors import UserError, exit_on_user_error

VERBS = (
    make_tiny,
    pack_command,
    verify_command,
    stats_command,
    filter_command,
    preview_command,
    tokenizer_command,
    emoji_command,
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
