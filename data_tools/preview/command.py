"""`siglip-data preview`: a page of random samples with captions, boxes and masks, to look at."""

import argparse
from pathlib import Path
from typing import Any

from data_tools.preview.card import card
from data_tools.preview.pick import pick
from data_tools.shared.arguments import add_cache_dir, positive
from data_tools.shared.facts import BOX_FIELDS
from data_tools.shared.whole_file import check_targets
from siglip_train.data.config import SourceConfig, extensions
from siglip_train.data.remote.locations import cache_folder
from siglip_train.data.shards.fields import Field
from siglip_train.errors import UserError
from siglip_train.files.atomic import write_whole
from siglip_train.redact import redacted
from siglip_train.report.render import render

EXAMPLE = """example:
  siglip-data preview 'data/web/{000..099}.tar' samples.html --text txt json:captions.* --samples 96
"""


def add_command(commands: Any) -> None:
    """Add `preview` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "preview",
        help="write a page of random samples to look at",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", help="as in data.sources.NAME.shards")
    parser.add_argument("page", type=Path, metavar="OUT.html", help="file to write, replaced if it is there")
    parser.add_argument("--image", default=SourceConfig.image, help="as in data.sources (%(default)s)")
    parser.add_argument(
        "--text",
        nargs="+",
        default=["txt"],
        help="fields that hold captions, as in data.sources (txt)",
    )
    parser.add_argument("--boxes", nargs="+", default=list(BOX_FIELDS), metavar="NAME",
                        help="fields of json with lists of boxes (objects boxes)")  # fmt: skip
    parser.add_argument("--samples", type=positive, default=48, help="at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    add_cache_dir(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}, but must be 0 or more")
    image = extensions(arguments.image)
    text = [Field.parse(name) for name in arguments.text]
    check_targets(arguments.page)
    cache = cache_folder(arguments.cache_dir)
    samples, unreadable = pick(arguments.shards, arguments.samples, arguments.seed, cache)
    for reason in unreadable:
        print(f"left out: {reason}")
    cards = [card(sample, image, text, arguments.boxes) for sample in samples]
    title = redacted(arguments.shards)
    write_whole(
        arguments.page, render("preview.html", package="data_tools.preview", title=title, cards=cards)
    )
    print(f"wrote {arguments.page}: {len(samples)} samples of {title}")
