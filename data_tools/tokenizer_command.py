"""`siglip-data tokenizer`: train a tokenizer on the captions of shards, in the form that training reads."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.tokenizer import train_tokenizer
from siglip_train.data.faults import SampleError
from siglip_train.data.samples import Field
from siglip_train.data.shards import read_samples
from siglip_train.errors import UserError

EXAMPLE = """example:
  siglip-data tokenizer 'data/web/{000..099}.tar' data/tokenizer.model --text txt json:names.* --vocab-size 8192
"""


def add_command(commands: Any) -> None:
    """Add `tokenizer` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "tokenizer",
        help="train a sentencepiece tokenizer on the captions of shards",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", help="as in data.sources.NAME.shards")
    parser.add_argument("model", type=Path, help="file to write, NAME.model")
    parser.add_argument(
        "--text",
        nargs="+",
        default=["txt"],
        help="fields that hold captions, as in data.sources (%(default)s)",
    )
    parser.add_argument("--vocab-size", type=int, default=8192, help="number of pieces (%(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if not arguments.model.name.endswith(".model"):
        raise UserError(f"the tokenizer's file must be named NAME.model, not {arguments.model}")
    captions = list(_captions(arguments.shards, [Field.parse(text) for text in arguments.text]))
    if not captions:
        raise UserError(f"{arguments.shards}: no caption under {', '.join(arguments.text)}")
    arguments.model.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(captions, arguments.model, arguments.vocab_size)
    print(f"wrote {arguments.model}: {arguments.vocab_size} pieces from {len(captions)} captions")


def _captions(shards: str, fields: list[Field]) -> Iterator[str]:
    """Every caption, those of broken samples left out as in training."""
    for sample in read_samples(shards):
        for field in fields:
            try:
                yield from (text for _, text in field.texts(sample))
            except SampleError:
                continue
