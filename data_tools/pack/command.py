"""`siglip-data pack`: shards from a folder of images, a table, COCO annotations, or other shards."""

import argparse
import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.shared.arguments import add_max_pixels, add_workers, folder_name, positive, share
from siglip_train.data.packing.images import FORMATS, ImageOptions
from siglip_train.data.packing.plan import SKIPPED, Packed, PackOptions, pack
from siglip_train.data.packing.records import SourceOptions
from siglip_train.errors import UserError

EXAMPLE = """examples:
  siglip-data pack photos data/photos --resize 384 --format webp
  siglip-data pack pairs.csv data/pairs --image-column file --caption-column title --image-root images
  siglip-data pack captions_val2017.json data/coco --coco-instances instances_val2017.json --image-root val2017
  siglip-data pack 'web/{00000..00099}.tar' data/web --shard-samples 5000
  siglip-data pack 'hf://datasets/uoft-cs/cifar10/plain_text/train-*.parquet' data/cifar \\
    --caption-template 'a photo of a {}'
"""
_SOURCE_HELP = (
    "folder of images with NAME.txt, NAME.json, NAME.mask.png, NAME.cls beside them, a metadata.jsonl, or in one "
    "folder a class; table (.csv .tsv .jsonl .json .parquet) of paths, or images, and captions; Parquet by URL; COCO "
    "captions or instances (.json); shards, as in data.sources.NAME.shards"
)


def add_command(commands: Any) -> None:
    """Add `pack` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "pack",
        help="make shards from images and captions in files, tables, COCO annotations or other shards",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    images, defaults = ImageOptions(), PackOptions()
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE_HELP)
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to create, or to go on with")
    parser.add_argument("--image-root", help="folder of a table's or COCO's images (that of the file)")
    parser.add_argument("--image-column", help="of paths in a table (the first of the usual names)")
    parser.add_argument(
        "--caption-column", help="column, or json field, of captions (the first of the usual names)"
    )
    parser.add_argument(
        "--label-column", help="column of classes, as numbers or names (that which the file calls so)"
    )
    parser.add_argument("--key-column", help="of unique names, which become the keys (the number of the row)")
    parser.add_argument("--caption-template", nargs="+", metavar="TEXT",
                        help="captions made of the names of classes, put where {} is; a sample takes one")  # fmt: skip
    parser.add_argument("--box-column", help="of boxes in a table, [x, y, width, height] in pixels: what the captions "
                        "of the row mean, as regions")  # fmt: skip
    parser.add_argument("--coco-instances", metavar="FILE", help="boxes to add to the captions")
    parser.add_argument("--resize", type=positive, metavar="SHORTEST_SIDE",
                        help="shrink larger images to it, pixels")  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default=images.format,
                        help="keep = the bytes as they are, unless shrunk (%(default)s)")  # fmt: skip
    parser.add_argument("--quality", type=positive, default=images.quality,
                        help="of jpg and webp that are encoded anew, 1 to 100 (%(default)s)")  # fmt: skip
    parser.add_argument("--grey-bits", type=int, choices=range(8, 16), metavar="8..15",
                        help="of the 16 of grey images, those in use: 12 of many cameras and scanners")  # fmt: skip
    add_max_pixels(parser)
    parser.add_argument("--shard-samples", type=positive, default=defaults.shard_samples,
                        help="records a shard (%(default)s)")  # fmt: skip
    parser.add_argument("--validation-share", type=share, default=defaults.validation_share,
                        help="drawn by a hash of the key (%(default)s)")  # fmt: skip
    parser.add_argument(
        "--split", type=folder_name, metavar="NAME", help="one folder for all, in place of shares"
    )
    add_workers(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.quality > 100:
        raise UserError(f"--quality is {arguments.quality}, but goes from 1 to 100")
    options = PackOptions(
        source=SourceOptions(
            image_root=arguments.image_root,
            image_column=arguments.image_column,
            caption_column=arguments.caption_column,
            coco_instances=arguments.coco_instances,
            label_column=arguments.label_column,
            key_column=arguments.key_column,
            caption_template=arguments.caption_template,
            box_column=arguments.box_column,
        ),
        images=ImageOptions(
            arguments.resize, arguments.format, arguments.quality, arguments.grey_bits, arguments.max_pixels
        ),
        shard_samples=arguments.shard_samples,
        validation_share=arguments.validation_share,
        split=arguments.split,
    )
    start = time.monotonic()
    try:
        with _what_is_found_on_the_screen():
            packed = pack(arguments.source, arguments.out_dir, options, arguments.workers)
    except OSError as error:
        raise UserError(f"{error}; the same command goes on from here once that is mended") from error
    state = f"wrote {arguments.out_dir} in {time.monotonic() - start:.1f} s"
    print(f"{state if packed.is_new else f'{arguments.out_dir} is up to date'}: {_counts(packed)}; "
          f"{_skipped(packed, arguments.out_dir)}")  # fmt: skip


@contextlib.contextmanager
def _what_is_found_on_the_screen() -> Iterator[None]:
    log, screen = logging.getLogger("siglip_train.data.packing"), logging.StreamHandler()
    log.addHandler(screen)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(screen)
        log.setLevel(logging.NOTSET)


def _counts(packed: Packed) -> str:
    return ", ".join(
        f"{split} {count} samples in {packed.shards[split]} shards" for split, count in packed.samples.items()
    )


def _skipped(packed: Packed, out_dir: Path) -> str:
    if not packed.skipped:
        return "nothing skipped"
    causes = ", ".join(f"{count} {cause}" for cause, count in packed.skipped.items())
    return f"skipped {sum(packed.skipped.values())} ({causes}), listed in {out_dir / SKIPPED}"
