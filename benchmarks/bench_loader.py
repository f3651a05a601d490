"""Training samples a second and core: this project's loader, open_clip's pipeline and plain webdataset.

Each has one worker, the same shards, image size, resize filter and sentencepiece model. open_clip's pipeline needs
webdataset 0.2.86, which is installed into `.venv-peer` on first use and found by that contestant alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from harness import Measurement, Row, finish, measure, rows
from loader_shards import prepare_cases

from siglip_train.data.shards.reader import read_samples

ROOT = Path(__file__).resolve().parents[1]
PEER_FOLDER = ROOT / ".venv-peer"
# without their dependencies, so that torch, Pillow and numpy are the same for all contestants
PEER_PACKAGES = ("webdataset==0.2.86", "pandas==2.3.3", "python-dateutil", "pytz", "six")
PRODUCTS = ("ours", "open_clip", "webdataset")
# this project on the peers' decoder, and without decoding at reduced scale
VARIANTS = ("ours, Pillow", "ours, full decode")
BASELINES = dict.fromkeys(("ours", "webdataset", *VARIANTS), "open_clip")
WARMUP_ROUNDS = 1


class Contestant:
    """A child process that measures its loader on demand."""

    def __init__(self, name: str, scratch: Path) -> None:
        folders = _import_folders(name, scratch)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "benchmarks" / "loader_contestants.py"), name]
        self.name, self.answers = name, []  # type: str, list[dict[str, float]]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def rate(self, job: dict) -> float:
        """Samples a second; the whole answer is kept beside."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended; its message is above")
        self.answers.append(json.loads(answer))
        return self.answers[-1]["per_second"]

    def largest(self, name: str) -> float:
        """The largest of all answers under a name."""
        return max(answer[name] for answer in self.answers)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _import_folders(name: str, scratch: Path) -> list[str]:
    """What a contestant finds first: the peer's webdataset, this project, or nothing but what is installed."""
    if name not in ("ours", *VARIANTS):
        return [str(PEER_FOLDER)] if name == "open_clip" else []
    if name != "ours, Pillow":
        return [str(ROOT)]
    hidden = scratch / "hidden"
    hidden.mkdir()
    (hidden / "simplejpeg.py").write_text("raise ImportError('hidden from this contestant')\n")
    return [str(hidden), str(ROOT)]


def install_peer() -> None:
    """Put what open_clip's pipeline needs into a folder of its own."""
    if not PEER_FOLDER.exists():
        print(f"installing {PEER_PACKAGES[0]} into {PEER_FOLDER.name}", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(PEER_FOLDER),
        ]
        subprocess.run([*command, *PEER_PACKAGES], check=True)


def compare(case: str, job: dict, contestants: Sequence[Contestant], rounds: int) -> list[Row]:
    """All loaders on one case, interleaved: rates by wall clock and by CPU time."""
    for contestant in contestants:
        contestant.answers.clear()
    timers: dict[str, Callable[[], float]] = {
        contestant.name: partial(contestant.rate, job) for contestant in contestants
    }
    by_wall = measure(timers, rounds=rounds, warmup=WARMUP_ROUNDS)
    by_cpu = {
        contestant.name: Measurement(
            [answer["per_cpu_second"] for answer in contestant.answers[WARMUP_ROUNDS:]],
            by_wall[contestant.name].others_cores,
        )
        for contestant in contestants
    }
    memory = {contestant.name: contestant.largest("memory_mb") for contestant in contestants}
    return [
        *rows("loader", case, "samples/s", by_wall, memory),
        *rows("loader", f"{case}, CPU time", "samples/CPU s", by_cpu, {}),
    ]


def worker_note(case: str, contestants: Sequence[Contestant]) -> str:
    """What one more worker would cost: the memory that a worker shares with no one."""
    each = ", ".join(f"{contestant.name} {contestant.largest('worker_mb'):.0f}" for contestant in contestants)
    return f"MB of its own that a worker holds at {case}: {each}"


def main() -> None:
    """Compare on generated images, photographs and emoji."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.5, help="of one measurement")
    parser.add_argument("--save", action="store_true", help="keep rows and report in results/")
    arguments = parser.parse_args()
    install_peer()
    table: list[Row] = []
    notes: list[str] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = prepare_cases(scratch)
        contestants = [Contestant(name, scratch) for name in (*PRODUCTS, *VARIANTS)]
        for contestant in contestants:
            stack.callback(contestant.close)
        for name, case in cases.items():
            job = {
                "shards": case.shards,
                "image_size": case.image_size,
                "tokenizer": str(scratch / "tiny" / "tokenizer.model"),
                "seconds": arguments.seconds,
            }
            taking_part = contestants if case.compares_decoders else contestants[: len(PRODUCTS)]
            table += compare(name, job, taking_part, arguments.rounds)
            notes.append(worker_note(name, taking_part))
            if case.of_jpeg:
                sizes = [len(sample.members["jpg"]) for sample in read_samples(case.shards)]
                notes.append(f"an image of {name} has {sum(sizes) / len(sizes) / 1000:.0f} KB")
    notes = [
        *notes,
        "one worker each, batches of 64, bicubic squash, 64 tokens of the same sentencepiece model; "
        "a CPU second counts the worker and the process that takes its batches",
        "memory is that of all processes of a contestant, pages they share counted once; of this project one is the"
        " server that workers are forked from, the same for any number of them",
        "the peers end in normalised float pixels, this project in uint8 patches that are normalised on the device",
        f"JPEG decoder of this project: {'simplejpeg' if find_spec('simplejpeg') else 'Pillow'}; of the peers: Pillow",
    ]
    finish(table, BASELINES, notes, save=arguments.save)


if __name__ == "__main__":
    main()
