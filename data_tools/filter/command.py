"""`siglip-data filter`: copy the samples of shards that pass rules, repeat nothing, and are balanced."""

import argparse
import time
from pathlib import Path
from typing import Any

from data_tools.filter.decide import Joint
from data_tools.filter.look import Wanted
from data_tools.filter.report import DROPPED, print_tables
from data_tools.filter.rules import RuleOptions
from data_tools.filter.run import FilterOptions, filter_shards
from data_tools.shared.arguments import add_cache_dir, add_max_pixels, add_workers, positive
from siglip_train.data.config import SourceConfig, extensions
from siglip_train.data.remote.locations import cache_folder, expand
from siglip_train.errors import UserError

EXAMPLE = """examples:
  siglip-data filter 'data/web/{000..099}.tar' data/clean --min-side 128 --max-aspect 3 --min-words 3 --dedup-images
  siglip-data filter data/web data/german --languages de --where 'json:score >= 0.3' --drop-text '(?i)\\bstock photo\\b'
  siglip-data filter data/web data/fair --balance gender.yaml
"""
_IMAGE_BITS, _MOST_BITS = 4, 10


def add_command(commands: Any) -> None:
    """Add `filter` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "filter",
        help="copy the samples of shards that pass rules, are no duplicates, and are balanced",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = RuleOptions()
    parser.add_argument("shards", metavar="SHARDS", help="as in data.sources.NAME.shards")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to create, or to go on with")
    parser.add_argument("--image", default=SourceConfig.image, help="as in data.sources (%(default)s)")
    parser.add_argument("--text", nargs="+", default=list(defaults.text), metavar="FIELD",
                        help="fields that hold captions; every caption must pass (txt)")  # fmt: skip
    parser.add_argument("--language", nargs="+", default=list(defaults.language), metavar="FIELD",
                        help="fields with the language, the first that has one (json:language json:lang)")  # fmt: skip
    _add_rules(parser)
    _add_joint(parser)
    add_cache_dir(parser)
    add_workers(parser)
    parser.set_defaults(run=_run)


def _add_rules(parser: argparse.ArgumentParser) -> None:
    rules = parser.add_argument_group("rules; a sample stays when all are true of it")
    rules.add_argument("--where", action="append", default=[], metavar="RULE",
                       help="FIELD OP VALUE, OP one of == != < <= > >= ~ !~ in (may be given again)")  # fmt: skip
    rules.add_argument(
        "--languages", nargs="+", default=[], metavar="LANGUAGE", help='"unknown": where none is given'
    )
    rules.add_argument("--min-side", type=positive, metavar="PIXELS", help="of the shorter side")
    add_max_pixels(rules)
    rules.add_argument("--max-aspect", type=float, metavar="RATIO", help="long side / short side")
    rules.add_argument("--min-chars", type=positive, metavar="N", help="characters of a caption")
    rules.add_argument("--max-chars", type=positive, metavar="N", help="characters of a caption")
    rules.add_argument("--min-words", type=positive, metavar="N", help="words of a caption, by spaces")
    rules.add_argument("--drop-text", action="append", default=[], metavar="REGEX",
                       help="drop samples with it in a caption (may be given again)")  # fmt: skip
    rules.add_argument("--keep-list", metavar="FILE", help="stay: `key` or `shard/key`, one a line")
    rules.add_argument("--drop-list", metavar="FILE", help="go: `key` or `shard/key`, one a line")
    rules.add_argument("--headers-only", action="store_true",
                       help="do not decode images to find broken ones: after a `verify` that passed")  # fmt: skip


def _add_joint(parser: argparse.ArgumentParser) -> None:
    joint = parser.add_argument_group(
        "over all shards, among the samples that stay; the first in order stays"
    )
    joint.add_argument("--dedup-images", nargs="?", type=_bits, const=_IMAGE_BITS, metavar="BITS",
                       help=f"drop images whose perceptual hashes differ in at most so many of 64 bits, and whose "
                       f"colours agree ({_IMAGE_BITS} where no number is given)")  # fmt: skip
    joint.add_argument("--dedup-texts", nargs="?", type=positive, const=1, metavar="N",
                       help="keep N samples of each caption, case and punctuation aside (1)")  # fmt: skip
    joint.add_argument("--balance", metavar="FILE", help="bring attributes to target shares (YAML or JSON)")
    joint.add_argument("--balance-as", choices=("subsample", "weights"), default="subsample",
                       help="drop samples, or write json:balance_weight, which is for other trainers: siglip-train "
                       "reads no weights (%(default)s)")  # fmt: skip


def _bits(text: str) -> int:
    value = int(text)
    if not 0 <= value <= _MOST_BITS:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 to {_MOST_BITS}")
    return value


def _run(arguments: argparse.Namespace) -> None:
    options = _options(arguments)
    start = time.monotonic()
    # a shard that two patterns name is one shard
    urls = list(dict.fromkeys(expand(arguments.shards)))
    cache = cache_folder(arguments.cache_dir)
    try:
        report, is_new = filter_shards(urls, arguments.out_dir, options, cache, arguments.workers)
    except OSError as error:
        raise UserError(f"{error}; the same command goes on from here once that is mended") from error
    print_tables(report)
    state = f"wrote {arguments.out_dir} in {time.monotonic() - start:.1f} s" if is_new else (
        f"{arguments.out_dir} is up to date")  # fmt: skip
    files = sum(1 for each in report["files"] if each["file"])
    print(f"{state}: {report['kept']:,} of {report['samples']:,} samples in {files} shards; "
          f"dropped ones are listed in {arguments.out_dir / DROPPED}")  # fmt: skip


def _options(arguments: argparse.Namespace) -> FilterOptions:
    if arguments.max_aspect is not None and not arguments.max_aspect >= 1:
        raise UserError(
            f"--max-aspect is {arguments.max_aspect}, but is long side over short side: at least 1"
        )
    if arguments.headers_only and arguments.dedup_images is not None:
        raise UserError("--dedup-images has to decode the images: leave --headers-only out")
    weigh = arguments.balance_as == "weights"
    if weigh and not arguments.balance:
        raise UserError("--balance-as weights needs --balance FILE")
    rules = RuleOptions(
        where=tuple(arguments.where),
        languages=tuple(arguments.languages),
        min_side=arguments.min_side,
        max_aspect=arguments.max_aspect,
        min_chars=arguments.min_chars,
        max_chars=arguments.max_chars,
        min_words=arguments.min_words,
        drop_text=tuple(arguments.drop_text),
        keep_list=arguments.keep_list,
        drop_list=arguments.drop_list,
        image=extensions(arguments.image),
        text=tuple(arguments.text),
        language=tuple(arguments.language),
    )
    wanted = Wanted(
        rules,
        headers_only=arguments.headers_only,
        images=arguments.dedup_images is not None,
        texts=arguments.dedup_texts is not None,
        spec=arguments.balance,
        facts=weigh,
        max_pixels=arguments.max_pixels,
    )
    return FilterOptions(wanted, Joint(arguments.dedup_images, arguments.dedup_texts, weigh))
