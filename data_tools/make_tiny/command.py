"""`siglip-data make-tiny`: the synthetic data set that the quick start trains on and the tests read."""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.make_tiny.captions import word_everywhere
from data_tools.make_tiny.preview import write_preview
from data_tools.make_tiny.shards import SAMPLES_PER_SHARD, ShardTask, plan_training, write_shard
from data_tools.make_tiny.vocabulary import CLASS_NAMES, HELD_OUT, SEEN, TEMPLATES
from data_tools.shared.arguments import add_workers, positive, share
from data_tools.tokenizer.train import TrainingOptions, train_tokenizer
from siglip_train.data.processes import run_all
from siglip_train.data.progress import progress
from siglip_train.errors import UserError
from siglip_train.files.atomic import put_folder

# raise it whenever the same options would give other bytes
GENERATOR_VERSION = 4
RECORD = "dataset.json"
TOKENIZER_SCENES = 4000
EXAMPLE = "example: siglip-data make-tiny data/tiny --samples 30000 --seed 0"


@dataclass(frozen=True)
class TinyOptions:
    """What decides the bytes of the data set."""

    samples: int = 30_000
    validation_samples: int = 500
    samples_per_class: int = 10
    referring_samples: int = 200
    vocab_size: int = 1024
    seed: int = 0
    several_share: float = 0.0

    def split_sizes(self) -> dict[str, int]:
        """The number of samples of each split."""
        return {
            "train": self.samples,
            "validation": self.validation_samples,
            "classes_seen": len(SEEN) * self.samples_per_class,
            "classes_unseen": len(HELD_OUT) * self.samples_per_class,
            "referring_seen": self.referring_samples,
            "referring_unseen": self.referring_samples,
        }


def add_command(commands: Any) -> None:
    """Add `make-tiny` to the sub-parsers of `siglip-data`."""
    parser = commands.add_parser(
        "make-tiny",
        help="draw a small synthetic data set: coloured shapes, true captions in eight languages",
        description=__doc__,
        epilog=EXAMPLE,
    )
    defaults = TinyOptions()
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to create")
    parser.add_argument("--samples", type=positive, default=defaults.samples, help="of train (%(default)s)")
    parser.add_argument("--validation-samples", type=positive, default=defaults.validation_samples,
                        help="of validation, no two with the same objects (%(default)s)")  # fmt: skip
    parser.add_argument("--samples-per-class", type=positive, default=defaults.samples_per_class,
                        help="of classes_seen and classes_unseen (%(default)s)")  # fmt: skip
    parser.add_argument("--referring-samples", type=positive, default=defaults.referring_samples,
                        help="of referring_seen and referring_unseen, of several objects (%(default)s)")  # fmt: skip
    parser.add_argument("--vocab-size", type=positive, default=defaults.vocab_size,
                        help="pieces of the tokenizer (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    parser.add_argument("--several-share", type=share, default=defaults.several_share,
                        help="of scenes of train that have two to four objects, no two alike, beside the three in ten"
                        " of the others (%(default)s)")  # fmt: skip
    add_workers(parser)
    parser.add_argument("--force", action="store_true", help="replace a data set made with other options")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    options = TinyOptions(
        samples=arguments.samples,
        validation_samples=arguments.validation_samples,
        samples_per_class=arguments.samples_per_class,
        referring_samples=arguments.referring_samples,
        vocab_size=arguments.vocab_size,
        seed=arguments.seed,
        several_share=arguments.several_share,
    )
    start = time.monotonic()
    try:
        is_new = make_tiny(arguments.out_dir, options, workers=arguments.workers, force=arguments.force)
    except OSError as error:
        raise UserError(f"cannot write {arguments.out_dir}: {error.strerror or error}") from error
    if is_new:
        sizes = ", ".join(f"{split} {size}" for split, size in options.split_sizes().items())
        print(f"wrote {arguments.out_dir} in {time.monotonic() - start:.1f} s: {sizes}")
    else:
        print(f"{arguments.out_dir} is up to date")


def make_tiny(out_dir: Path, options: TinyOptions, *, workers: int = 1, force: bool = False) -> bool:
    """Create the data set at `out_dir`; return False when it is already there with the same options.

    The folder appears complete or not at all. Raises UserError when something else is there.
    """
    record = {"generator": "make-tiny", "version": GENERATOR_VERSION, **asdict(options)}
    if _is_there(out_dir, record, force=force):
        return False
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        # first, because a vocabulary size that cannot be had should not cost the drawing
        train_tokenizer(
            _tokenizer_captions(options.seed),
            folder / "tokenizer.model",
            # what boxes are written with: no caption has them, and as bytes a box would take 28 tokens
            TrainingOptions(options.vocab_size, symbols="0123456789:"),
        )
        _write_shards(folder, options, workers)
        _write_class_files(folder)
        write_preview(folder / "train" / "00000.tar", folder / "preview.png")
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        put_folder(folder, out_dir)
    return True


def _is_there(out_dir: Path, record: dict[str, Any], *, force: bool) -> bool:
    """Whether the same data set is at `out_dir`; UserError when something stands there that may not go."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    try:
        present = json.loads((out_dir / RECORD).read_text())
    except (OSError, ValueError):
        present = None
    # --force never deletes a folder that this command did not make
    if not isinstance(present, dict) or present.get("generator") != "make-tiny":
        raise UserError(f"{out_dir} exists and was not made by make-tiny: name another folder")
    if present != record and not force:
        changed = ", ".join(f"{key} {present.get(key)}" for key in record if present.get(key) != record[key])
        raise UserError(
            f"{out_dir} was made with other options ({changed}): name another folder or add --force"
        )
    return present == record


def _write_shards(folder: Path, options: TinyOptions, workers: int) -> None:
    tasks = []
    for split, size in options.split_sizes().items():
        (folder / split).mkdir()
        # four shards at least, so that a small set still exercises several
        step = min(SAMPLES_PER_SHARD, -(-size // 4))
        for number, start in enumerate(range(0, size, step)):
            path = folder / split / f"{number:05d}.tar"
            tasks.append(
                ShardTask(path, split, options.seed, start, min(start + step, size), options.several_share)
            )
    with progress(sum(options.split_sizes().values()), "drawing", "drew") as advance:
        for count in run_all(write_shard, tasks, workers):
            advance(count)


def _write_class_files(folder: Path) -> None:
    for split in ("classes_seen", "classes_unseen"):
        (folder / split / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASS_NAMES))
        (folder / split / "templates.txt").write_text("".join(f"{template}\n" for template in TEMPLATES))


def _tokenizer_captions(seed: int) -> Iterator[str]:
    """Captions of training scenes in every language; as many for a small set as for a large one."""
    for index in range(TOKENIZER_SCENES):
        yield from word_everywhere(plan_training(seed, index).description).values()
