"""`siglip-data tokenizer`: train a tokenizer on the captions of shards, or look at how well one serves them."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_tools.shared.arguments import add_cache_dir, add_workers, positive
from data_tools.shared.whole_file import check_targets
from data_tools.stats.counters import BadSamples
from data_tools.tokenizer.captions import CaptionFields, draw_captions
from data_tools.tokenizer.summary import print_table, summarise
from data_tools.tokenizer.tally import InspectTask, Tally, Vocabulary, inspect_shard
from data_tools.tokenizer.train import TrainingOptions, train_tokenizer
from siglip_train.data.processes import run_all
from siglip_train.data.progress import progress
from siglip_train.data.remote.locations import cache_folder, expand
from siglip_train.data.shards.fields import Field
from siglip_train.errors import UserError
from siglip_train.files.atomic import write_whole

EXAMPLE = """examples:
  siglip-data tokenizer 'data/web/{000..099}.tar' data/tokenizer.model --text txt json:names.* --vocab-size 8192
  siglip-data tokenizer 'data/web/{000..099}.tar' data/tokenizer.model --inspect --text json:names --json tokens.json
"""
_LANGUAGE = ("json:language", "json:lang")
_CONTEXT_LENGTH = 64
# options that one of the two forms alone has; they have no default of argparse's
_OF_TRAINING = (
    "vocab_size",
    "model_type",
    "character_coverage",
    "byte_fallback",
    "symbols",
    "sentences",
    "force",
)
_OF_INSPECTION = ("language", "context_length", "json")


def add_command(commands: Any) -> None:
    """Add `tokenizer` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "tokenizer",
        help="train a sentencepiece tokenizer on the captions of shards, or inspect one",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", metavar="SHARDS", help="as in data.sources.NAME.shards")
    parser.add_argument("model", type=Path, metavar="MODEL",
                        help="file to write, NAME.model; with --inspect, what training reads")  # fmt: skip
    parser.add_argument("--text", nargs="+", default=["txt"], metavar="FIELD",
                        help="fields that hold captions, as in data.sources (txt)")  # fmt: skip
    add_cache_dir(parser)
    add_workers(parser)
    _add_training(parser.add_argument_group("training"))
    _add_inspection(parser.add_argument_group("inspection"))
    parser.set_defaults(run=_run)


def _add_training(group: Any) -> None:
    defaults = TrainingOptions()
    group.add_argument("--vocab-size", type=positive, help=f"number of pieces ({defaults.vocab_size})")
    group.add_argument("--type", dest="model_type", choices=("bpe", "unigram"),
                       help=f"of model ({defaults.model_type})")  # fmt: skip
    group.add_argument("--character-coverage", type=_coverage, metavar="SHARE",
                       help=f"of characters that become pieces ({defaults.character_coverage})")  # fmt: skip
    group.add_argument("--no-byte-fallback", dest="byte_fallback", action="store_const", const=False,
                       help="other characters are unknown, instead of their bytes in UTF-8")  # fmt: skip
    group.add_argument("--symbols", metavar="CHARACTERS",
                       help="are always pieces of their own; 0123456789: for a decoder that writes boxes")  # fmt: skip
    group.add_argument("--sentences", type=positive, metavar="N",
                       help="train on N captions, the same ones in every run (all)")  # fmt: skip
    group.add_argument("--force", action="store_const", const=True, help="replace a model that is there")


def _add_inspection(group: Any) -> None:
    group.add_argument("--inspect", action="store_true", help="do not train: count, language by language, "
                       "tokens of captions and words, coverage and use of the vocabulary")  # fmt: skip
    group.add_argument("--language", nargs="+", metavar="FIELD",
                       help=f"fields with the language, where no mapping names it ({' '.join(_LANGUAGE)})")  # fmt: skip
    group.add_argument("--context-length", type=positive, metavar="TOKENS",
                       help=f"longer captions are counted, the end token included ({_CONTEXT_LENGTH})")  # fmt: skip
    group.add_argument("--json", type=Path, metavar="OUT.json", help="all numbers, and the worst words")


def _coverage(text: str) -> float:
    value = float(text)
    # below, sentencepiece itself fails without a reason
    if not 0.98 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not in 0.98 to 1")
    return value


def _run(arguments: argparse.Namespace) -> None:
    others = _OF_TRAINING if arguments.inspect else _OF_INSPECTION
    for name in others:
        if getattr(arguments, name) is not None:
            option = {"model_type": "type", "byte_fallback": "no-byte-fallback"}.get(
                name, name.replace("_", "-")
            )
            raise UserError(
                f"--{option} means nothing {'with' if arguments.inspect else 'without'} --inspect"
            )
    if arguments.inspect:
        _inspect(arguments)
    else:
        _train(arguments)


def _train(arguments: argparse.Namespace) -> None:
    if not arguments.model.name.endswith(".model"):
        raise UserError(f"the tokenizer's file must be named NAME.model, not {arguments.model}")
    check_targets(arguments.model)
    if arguments.model.exists() and not arguments.force:
        raise UserError(
            f"{arguments.model} is there already: name another file, or add --force to replace it"
        )
    given = {each.name: getattr(arguments, each.name) for each in fields(TrainingOptions)}
    options = TrainingOptions(**{name: value for name, value in given.items() if value is not None})
    where = CaptionFields(tuple(map(Field.parse, arguments.text)))
    cache = cache_folder(arguments.cache_dir)
    sentences = draw_captions(arguments.shards, where, arguments.sentences or 0, cache, arguments.workers)
    _tell_bad(sentences.bad)
    if not sentences.texts:
        raise UserError(f"{arguments.shards}: no caption under {', '.join(arguments.text)}")
    train_tokenizer(sentences.texts, arguments.model, options)
    part = "" if len(sentences.texts) == sentences.found else f" of {sentences.found}"
    print(f"wrote {arguments.model}: {options.vocab_size} pieces from {len(sentences.texts)}{part} captions")


def _inspect(arguments: argparse.Namespace) -> None:
    check_targets(arguments.json)
    length = arguments.context_length or _CONTEXT_LENGTH
    vocabulary = Vocabulary(str(arguments.model), length)
    where = CaptionFields(
        tuple(map(Field.parse, arguments.text)), tuple(map(Field.parse, arguments.language or _LANGUAGE))
    )
    cache, urls = cache_folder(arguments.cache_dir), expand(arguments.shards)
    tasks = [InspectTask(url, cache, where, str(arguments.model), length) for url in urls]
    tallies: dict[str, Tally] = {}
    bad = BadSamples()
    with progress(len(tasks), "inspecting", "inspected", "shards") as advance:
        for part, faults in run_all(inspect_shard, tasks, arguments.workers):
            for language, tally in part.items():
                tallies.setdefault(language, Tally()).merge(tally)
            bad.merge(faults)
            advance(1)
    _tell_bad(bad)
    if not tallies:
        raise UserError(f"{arguments.shards}: no caption under {', '.join(arguments.text)}")
    summary = summarise(tallies, vocabulary)
    print_table(summary)
    if arguments.json:
        summary["bad"] = dict(sorted(bad.causes.items()))
        write_whole(arguments.json, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {arguments.json}")


def _tell_bad(bad: BadSamples) -> None:
    if bad.named:
        counts = ", ".join(f"{count} {cause}" for cause, count in bad.causes.most_common())
        print(f"left out {counts}; the first: {bad.named[0]}")
