"""`siglip-data recipes`: where public data sets come from, and the commands that make shards of them."""

import argparse
from typing import Any

from data_tools.recipes.data_sets import RECIPES, as_text
from siglip_train.errors import UserError


def add_command(commands: Any) -> None:
    """Add `recipes` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "recipes",
        help="print the commands that get a public data set",
        description=__doc__,
        epilog="example: siglip-data recipes cifar10",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a data set; without, all are listed")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.name is None:
        width = max(len(recipe.name) for recipe in RECIPES)
        for recipe in RECIPES:
            print(f"{recipe.name:{width}}  {recipe.title}\n{'':{width}}  {recipe.size}; {recipe.licence}")
        return
    found = [recipe for recipe in RECIPES if recipe.name == arguments.name]
    if not found:
        raise UserError(
            f"there is no recipe {arguments.name}; there are {', '.join(each.name for each in RECIPES)}"
        )
    print(as_text(found[0]), end="")
