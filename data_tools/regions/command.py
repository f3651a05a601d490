"""`siglip-data regions`: copy shards, with the boxes that a detector finds for the words of the captions."""

import argparse
import time
from pathlib import Path
from typing import Any

from data_tools.regions.annotate import Wanted, processes_by_default
from data_tools.regions.owl import check_folder
from data_tools.regions.run import BAD, PREVIEW, annotate
from data_tools.shared.arguments import add_cache_dir, add_max_pixels, positive, share
from siglip_train.data.config import SourceConfig, extensions
from siglip_train.data.prompts import read_class_names
from siglip_train.data.remote.locations import cache_folder, expand
from siglip_train.data.shards.fields import Field
from siglip_train.errors import UserError
from siglip_train.files.atomic import read_text

EXAMPLE = """examples:
  siglip-data regions 'data/web/{000..099}.tar' data/web_regions --detector models/owlv2 --share 0.1
  siglip-data regions data/web data/web_regions --detector models/owlv2 --categories names.txt --workers 8
  siglip-data regions data/coco data/coco_regions --detector json:objects
"""


def add_command(commands: Any) -> None:
    """Add `regions` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "regions",
        help="copy shards, with the boxes that a detector finds for the words of the captions",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = Wanted("")
    parser.add_argument("shards", metavar="SHARDS", help="as in data.sources.NAME.shards")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to create, or to go on with")
    parser.add_argument("--detector", required=True, metavar="PATH",
                        help="folder of an OWLv2 or OWL-ViT of transformers; json:FIELD = the boxes that samples have "
                        "already, matched by the words of their labels")  # fmt: skip
    parser.add_argument("--image", default=SourceConfig.image, help="as in data.sources (%(default)s)")
    parser.add_argument("--text", nargs="+", default=list(usual.text), metavar="FIELD",
                        help="fields that hold captions (txt)")  # fmt: skip
    parser.add_argument("--field", default=usual.field, metavar="NAME",
                        help="of json, that gets the regions (%(default)s)")  # fmt: skip
    _add_texts(parser, usual)
    boxes = parser.add_argument_group("boxes")
    boxes.add_argument("--min-score", type=share, default=usual.min_score, help="of a box (%(default)s)")
    boxes.add_argument("--overlap", type=share, default=usual.overlap, metavar="IOU",
                       help="of boxes that overlap more, the best stays (%(default)s)")  # fmt: skip
    add_max_pixels(parser)
    add_cache_dir(parser)
    speed = parser.add_argument_group("speed")
    speed.add_argument("--batch-size", type=positive, default=8, help="images at once (%(default)s)")
    speed.add_argument("--workers", type=positive, metavar="N",
                       help="processes, each with a detector; GPUs are shared out (one for each GPU)")  # fmt: skip
    speed.add_argument("--full-precision", action="store_true",
                       help="float32 on a GPU too, in place of bfloat16")  # fmt: skip
    parser.set_defaults(run=_run)


def _add_texts(parser: argparse.ArgumentParser, usual: Wanted) -> None:
    texts = parser.add_argument_group("which samples, and which texts are looked for")
    texts.add_argument("--share", type=share, default=usual.share,
                       help="of the samples, drawn by key; the others stay as they are (%(default)s)")  # fmt: skip
    texts.add_argument("--categories", metavar="FILE", help="names to look for in every image, one a line")
    texts.add_argument("--max-words", type=positive, default=usual.longest, metavar="N",
                       help="of an n-gram of the caption (%(default)s)")  # fmt: skip
    texts.add_argument("--caption-words", type=positive, default=usual.caption_words, metavar="N",
                       help="of a caption that are read (%(default)s)")  # fmt: skip
    texts.add_argument("--stop-words", metavar="FILE",
                       help="words that say nothing alone, one a line, beside the English ones")  # fmt: skip
    texts.add_argument("--any-caption", action="store_true",
                       help="annotate samples too whose captions have no word that may be a noun")  # fmt: skip


def _run(arguments: argparse.Namespace) -> None:
    wanted = _wanted(arguments)
    start = time.monotonic()
    # a shard that two patterns name is one shard
    urls = list(dict.fromkeys(expand(arguments.shards)))
    cache = cache_folder(arguments.cache_dir)
    workers = arguments.workers or processes_by_default(wanted.detector)
    try:
        report, is_new = annotate(
            urls, arguments.out_dir, wanted, cache, workers=workers, batch=arguments.batch_size
        )
    except OSError as error:
        raise UserError(f"{error}; the same command goes on from here once that is mended") from error
    seconds = time.monotonic() - start
    out = arguments.out_dir
    state = f"wrote {out} in {seconds:.1f} s" if is_new else f"{out} is up to date"
    print(f"{state}: {report['samples']:,} samples, {report['annotated']:,} annotated, of which "
          f"{report['with_regions']:,} have regions ({_listed(report['regions']) or 'none'})")  # fmt: skip
    print(f"{report['samples'] - report['drawn']:,} not drawn, {report['without_noun']:,} whose captions name nothing, "
          f"{sum(report['bad'].values()):,} bad{_in_brackets(report['bad'], out / BAD)}")  # fmt: skip
    print(f"to look at: {out / PREVIEW}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} of {origin}" for origin, count in counts.items())


def _in_brackets(bad: dict[str, int], path: Path) -> str:
    causes = ", ".join(f"{count:,} {cause}" for cause, count in bad.items())
    return f" ({causes}), listed in {path}" if causes else ""


def _wanted(arguments: argparse.Namespace) -> Wanted:
    if not arguments.share:
        raise UserError("--share is 0: nothing would be annotated")
    if not arguments.field or "." in arguments.field:
        raise UserError(f"--field is {arguments.field!r}, but must be a name without a dot")
    detector = arguments.detector
    if detector.startswith("json:"):
        if not Field.parse(detector).path:
            raise UserError(f"--detector is {detector}: name the json field of the boxes, json:objects")
    else:
        check_folder(Path(detector))
    stop_words = read_text(arguments.stop_words).lower().split() if arguments.stop_words else ()
    return Wanted(
        detector=detector,
        text=tuple(arguments.text),
        image=extensions(arguments.image),
        field=arguments.field,
        share=arguments.share,
        categories=tuple(dict.fromkeys(read_class_names(arguments.categories)))
        if arguments.categories
        else (),
        stop_words=frozenset(stop_words),
        longest=arguments.max_words,
        caption_words=arguments.caption_words,
        any_caption=arguments.any_caption,
        min_score=arguments.min_score,
        overlap=arguments.overlap,
        full_precision=arguments.full_precision,
        max_pixels=arguments.max_pixels,
    )
