"""`siglip-data verify`: open every sample, name every fault; exit status 0 = good, 1 = faults, 2 = wrong use."""

import argparse
from pathlib import Path
from typing import Any

from data_tools.shared.arguments import add_cache_dir, add_max_pixels, add_workers, positive, share
from data_tools.shared.whole_file import check_targets
from data_tools.verify.all_shards import verify_shards
from data_tools.verify.checks import Rules
from data_tools.verify.outcome import Outcome
from siglip_train.data.config import SourceConfig, extensions
from siglip_train.data.progress import progress
from siglip_train.data.remote.locations import cache_folder, expand
from siglip_train.errors import UserError

EXAMPLE = """example:
  siglip-data verify 'data/web/{000..099}.tar' --text txt json:captions.* --tokenizer data/tokenizer.model \\
      --report problems.json --index index.json --allow 0.001
"""


def add_command(commands: Any) -> None:
    """Add `verify` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "verify",
        help="open every sample of shards and report what is broken",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Rules(())
    parser.add_argument("shards", help="as in data.sources.NAME.shards")
    parser.add_argument("--image", default=SourceConfig.image, help="as in data.sources (%(default)s)")
    parser.add_argument(
        "--text",
        nargs="*",
        default=list(defaults.text),
        help="fields that hold captions, as in data.sources; none = no captions wanted (txt)",
    )
    parser.add_argument(
        "--label", metavar="FIELD", help="check labels: cls, or a field such as json:class_index"
    )
    parser.add_argument("--tokenizer", metavar="MODEL", help="look at the lengths of captions with it")
    parser.add_argument(
        "--context-length", type=positive, help=f"tokens with the end ({defaults.context_length})"
    )
    parser.add_argument("--min-side", type=positive, default=defaults.min_side, help="pixels (%(default)s)")
    add_max_pixels(parser)
    parser.add_argument(
        "--max-aspect", type=float, default=defaults.max_aspect, help="long / short side (%(default)s)"
    )
    parser.add_argument(
        "--allow", type=share, default=0.0, help="share of bad samples that still passes (%(default)s)"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write every problem")
    parser.add_argument(
        "--index",
        type=Path,
        metavar="FILE.json",
        help="write sizes, checksums and counts; beside remote shards, as index.json, it saves counting them",
    )
    add_cache_dir(parser)
    add_workers(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    rules = _rules(arguments)
    check_targets(arguments.report, arguments.index)
    # a shard that two patterns name is one shard
    urls = list(dict.fromkeys(expand(arguments.shards)))
    cache = cache_folder(arguments.cache_dir)
    with progress(len(urls), "verifying", "verified", "shards") as advance:
        reports = verify_shards(urls, rules, cache, arguments.workers, advance)
    outcome = Outcome(reports, rules, arguments.allow)
    if arguments.report:
        outcome.write_report(arguments.report)
    if arguments.index:
        outcome.write_index(arguments.index)
    outcome.print()
    if not outcome.passed:
        raise SystemExit(1)


def _rules(arguments: argparse.Namespace) -> Rules:
    if arguments.context_length and not arguments.tokenizer:
        raise UserError("--context-length counts tokens: add --tokenizer MODEL")
    if not arguments.max_aspect >= 1:
        raise UserError(
            f"--max-aspect is {arguments.max_aspect}, but is long side over short side: at least 1"
        )
    return Rules(
        image=extensions(arguments.image),
        text=tuple(arguments.text),
        label=arguments.label,
        min_side=arguments.min_side,
        max_pixels=arguments.max_pixels,
        max_aspect=arguments.max_aspect,
        tokenizer=arguments.tokenizer,
        context_length=arguments.context_length or Rules.context_length,
    )
