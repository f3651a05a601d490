"""Fine-tune a SigLIP 2 B/16 of real size for two steps by the short command of each experiment, and say what it takes.

The model is what transformers writes, with random weights: 375 M parameters, a vocabulary of 256,000. It takes about
12 GB of memory and of disk.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import RESULTS, environment
from released_model import B16, write_images, write_released

CLASSIFICATION = ("finetune_frozen", "finetune_lora", "finetune_full")
PAIRS = ("finetune_contrastive", "finetune_text", "adapt_resolution")


def short_command(experiment: str, released: Path, data: Path) -> list[str]:
    """What a user types: an experiment, a folder and a source."""
    return [f"experiment={experiment}", f"init_from={released}", f"data.sources.mine.folder={data}"]


@dataclass(frozen=True)
class Outcome:
    """What the log and the metrics of two steps say, and the peak of the process's memory in GB."""

    experiment: str
    model: str
    trained: str
    losses: list[float]
    held_out: dict[str, float]
    peak_gb: float


def outcome(experiment: str, run_dir: Path, peak_kib: int) -> Outcome:
    """Read a finished run. Raises ValueError where a loss is not finite."""
    log = (run_dir / "log.txt").read_text()
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    if not losses or not all(map(math.isfinite, losses)):
        raise ValueError(f"{experiment}: losses {losses}")
    model = re.search(r"INFO (.* M parameters, .*)", log)
    trained = re.search(r"; (.* M of .* M) parameters are trained", log)
    held_out = {
        name: value for record in records for name, value in record.items() if name.startswith("val/")
    }
    assert model is not None, log
    return Outcome(
        experiment, model[1], trained[1] if trained else "all", losses, held_out, peak_kib / 1e6 * 1.024
    )


def outcomes(folder: Path, experiments: Sequence[str], batch: int) -> Iterator[Outcome]:
    """Run every experiment by its command, one after another, in processes of their own."""
    released = folder / "siglip2-base-patch16-256"
    # in a process of its own: those that it starts later begin with the peak of this one
    maker = multiprocessing.get_context("spawn").Process(target=write_released, args=(released, B16))
    maker.start()
    maker.join()
    classes, pairs = (
        write_images(folder / "classes", captions=False),
        write_images(folder / "pairs", captions=True),
    )
    for experiment in experiments:
        run_dir = folder / "run"
        command = short_command(experiment, released, classes if experiment in CLASSIFICATION else pairs)
        more = [f"run_dir={run_dir}", f"global_batch_size={batch}", "stop_after_steps=2", "log.every_steps=1",
                f"data.cache_dir={folder}/cache", "data.workers=0", "evaluation.batch_size=4",
                "checkpoint.keep=1"]  # fmt: skip
        print(f"siglip-train {' '.join(command)}", flush=True)
        process = subprocess.Popen([sys.executable, "-m", "siglip_train.train", *command, *more])
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            sys.exit(f"{experiment} ended with status {os.waitstatus_to_exitcode(status)}")
        yield outcome(experiment, run_dir, usage.ru_maxrss)
        shutil.rmtree(run_dir)


def table(found: list[Outcome]) -> str:
    """A line an experiment, in Markdown."""
    lines = [
        "| experiment | model | trained | losses of two steps | held out | peak, GB |",
        "|---|---|--:|---|---|--:|",
    ]
    for each in found:
        losses = ", ".join(f"{loss:.4f}" for loss in each.losses)
        name, value = next(iter(each.held_out.items()), ("", float("nan")))
        lines.append(f"| `{each.experiment}` | {each.model} | {each.trained} | {losses} | {name.removeprefix('val/')} "
                     f"{value:.3f} | {each.peak_gb:.1f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Run all, print the table, and write it with --save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*", default=[*CLASSIFICATION, *PAIRS], help="which (all)")
    parser.add_argument("--batch", type=int, default=4, help="global_batch_size (%(default)s)")
    parser.add_argument("--folder", type=Path, help="for the model and the runs (a temporary one)")
    parser.add_argument("--save", action="store_true", help="write results/finetune_real_size_….md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = []
        for each in outcomes(Path(folder), arguments.experiments, arguments.batch):
            found.append(each)
            # those that are done are seen where a later one fails, or there is no time for it
            print(table([each]), flush=True)
    report = table(found)
    print(report)
    if arguments.save:
        place = environment()
        path = RESULTS / f"finetune_real_size_{place['date'][:7].replace('-', '')}.md"
        path.write_text(
            f"# Two steps of {arguments.batch} images of a SigLIP 2 B/16\n\n{_described(place)}\n\n{report}\n"
        )
        print(f"kept in {path}")


def _described(place: Mapping[str, str]) -> str:
    return (f"{place['date']}, revision {place['revision']}, {place['hardware']}, torch {place['torch']}, Python "
            f"{place['python']}; by `python benchmarks/finetune_real_size.py --save`. Weights are random.")  # fmt: skip


if __name__ == "__main__":
    main()
