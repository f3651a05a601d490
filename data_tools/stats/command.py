"""`siglip-data stats`: what is in shards, counted: sizes, captions, languages, duplicates, decode speed."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.shared.arguments import add_cache_dir, add_workers, positive
from data_tools.shared.result_cache import ResultCache, version
from data_tools.shared.whole_file import check_targets
from data_tools.stats.kept_tally import from_json, to_json
from data_tools.stats.measure import Measures, ShardTask, measure_shard
from data_tools.stats.page import page
from data_tools.stats.summary import summarise
from data_tools.stats.tally import Tally
from data_tools.stats.terminal import print_tables
from siglip_train.data.progress import progress
from siglip_train.data.remote.locations import cache_folder, expand
from siglip_train.data.shards.fields import Field
from siglip_train.data.tokenizer import TextRules, load_tokenizer
from siglip_train.errors import UserError
from siglip_train.files.atomic import write_whole
from siglip_train.redact import redacted

EXAMPLE = """example:
  siglip-data stats 'data/web/{000..099}.tar' --tokenizer data/tokenizer.model --report stats.html --json stats.json
"""
FIELDS = (
    ("--text", ["txt"], "fields that hold captions, as in data.sources"),
    ("--language", ["json:language", "json:lang"], "fields with the language, where no mapping names it"),
    ("--labels", ["json:objects.*.label", "json:boxes.*.label"], "fields with the labels of objects"),
)
# images of all shards together
_DECODED = 512
_SHOWN = 24
# of kept tallies: raise it when they hold something else
_FORMAT = 1


def add_command(commands: Any) -> None:
    """Add `stats` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "stats",
        help="count what is in shards: sizes, captions, languages, duplicates, decode speed",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", metavar="SHARDS", help="as in data.sources.NAME.shards")
    for name, fields, meaning in FIELDS:
        meant = f"{meaning} ({' '.join(fields)})"
        parser.add_argument(name, nargs="+", default=fields, metavar="FIELD", help=meant)
    parser.add_argument("--tokenizer", metavar="MODEL", help="count tokens; as tokenizer of a training")
    parser.add_argument("--context-length", type=positive, default=64, metavar="TOKENS",
                        help="captions above are counted, the end token included (%(default)s)")  # fmt: skip
    parser.add_argument("--samples", type=_not_negative, default=0, metavar="N",
                        help="read so many at most, spread evenly over the shards (0: all)")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="OUT.html", help="a page with charts and images")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="all numbers")
    add_cache_dir(parser)
    add_workers(parser)
    parser.set_defaults(run=_run)


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _run(arguments: argparse.Namespace) -> None:
    measures = Measures(
        text=tuple(map(Field.parse, arguments.text)),
        language=tuple(map(Field.parse, arguments.language)),
        labels=tuple(map(Field.parse, arguments.labels)),
        tokenizer=arguments.tokenizer,
        context_length=arguments.context_length,
    )
    if measures.tokenizer is not None:
        # a mistake there should show before any shard is read
        load_tokenizer(measures.tokenizer, TextRules(pad="eos"), measures.context_length)
    outputs = [path for path in (arguments.report, arguments.json) if path is not None]
    check_targets(*outputs)
    shown = _SHOWN if arguments.report else 0
    cache = cache_folder(arguments.cache_dir)
    tasks = plan(expand(arguments.shards), measures, cache, samples=arguments.samples, shown=shown)
    kept: ResultCache[Tally] = ResultCache(cache / "stats", _identity(tasks), to_json, from_json)
    tally = measure(tasks, arguments.workers, kept)
    summary = summarise(tally, measures)
    print_tables(summary)
    if arguments.json:
        write_whole(arguments.json, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if arguments.report:
        write_whole(arguments.report, page(redacted(arguments.shards), tally, summary))
    for path in outputs:
        print(f"wrote {path}")
    kept.forget()


def _identity(tasks: list[ShardTask]) -> Any:
    first = tasks[0].measures
    tokenizer = [first.tokenizer, version(first.tokenizer)] if first.tokenizer else None
    return [_FORMAT, repr(tasks), tokenizer]


def plan(
    urls: list[str], measures: Measures, cache: Path, *, samples: int = 0, shown: int = 0
) -> list[ShardTask]:
    """A task for each shard that is to be read; samples 0 = all of them."""
    shares: Sequence[int | None] = _shares(samples, len(urls)) if samples else [None] * len(urls)
    used = [(url, share) for url, share in zip(urls, shares, strict=True) if share != 0]
    parts = zip(used, _shares(_DECODED, len(used)), _shares(shown, len(used)), strict=True)
    return [
        ShardTask(url, measures, cache, share, decoded, images) for (url, share), decoded, images in parts
    ]


def _shares(whole: int, parts: int) -> list[int]:
    """`whole` in `parts` integers that differ by one at most, the larger ones spread evenly."""
    return [(place + 1) * whole // parts - place * whole // parts for place in range(parts)]


def measure(tasks: list[ShardTask], workers: int, kept: ResultCache[Tally]) -> Tally:
    """Count all shards, those of an interrupted run as it left them. Raises UserError where none can be read."""
    tally = Tally()
    with progress(len(tasks), "measuring", "measured", "shards") as advance:
        for part in kept.run(measure_shard, tasks, workers):
            tally.merge(part)
            advance(1)
    if not tally.samples:
        reason = str(tally.bad.named[0]) if tally.bad.named else "no member forms a sample"
        raise UserError(f"no sample to count: {reason}")
    return tally
