"""Training samples a second and core: this project's loader, open_clip's pipeline and plain webdataset.

Each has one worker, the same shards, picture size, resize filter and sentencepiece model. open_clip's pipeline needs
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

from data_tools.make_tiny import TinyOptions, make_tiny

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
PEER_FOLDER = ROOT / ".venv-peer"
# without their dependencies, so that torch, Pillow and numpy are the same for all contestants
PEER_PACKAGES = ("webdataset==0.2.86", "pandas==2.3.3", "python-dateutil", "pytz", "six")
BASELINES = {"ours": "open_clip", "webdataset": "open_clip"}
WARMUP_ROUNDS = 1


class Contestant:
    """A child process that measures its loader on demand."""

    def __init__(self, name: str) -> None:
        folders = [str(PEER_FOLDER)] if name == "open_clip" else [str(ROOT)] if name == "ours" else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "benchmarks" / "loader_contestants.py"), name]
        self.name, self.cpu_rates = name, []  # type: str, list[float]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def rate(self, job: dict) -> float:
        """Samples a second; the rate a CPU second is kept beside."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended; its message is above")
        rates = json.loads(answer)
        self.cpu_rates.append(rates["per_cpu_second"])
        return rates["per_second"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


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


def prepare_cases(scratch: Path) -> dict[str, tuple[list[str], int]]:
    """Shards and picture side of every case; those of `../shared/data` only where it is."""
    make_tiny(
        scratch / "tiny", TinyOptions(samples=4000, validation_samples=4, samples_per_class=1), workers=2
    )
    cases = {"tiny shapes 128 px": (sorted(map(str, (scratch / "tiny" / "train").glob("*.tar"))), 128)}
    if not SHARED.exists():
        print("../shared/data is absent: photographs and emoji are left out")
        return cases
    photographs = []
    for number in range(8):
        link = scratch / f"coco-{number:05d}.tar"
        link.symlink_to(SHARED / "captions_coco" / "open-00000.tar")
        photographs.append(str(link))
    emoji = sorted(map(str, (SHARED / "emoji_train").glob("*.tar")))
    return {**cases, "photographs 224 px": (photographs, 224), "emoji 64 px": (emoji, 64)}


def compare(case: str, job: dict, contestants: Sequence[Contestant], rounds: int) -> list[Row]:
    """All loaders on one case, interleaved: rates by wall clock and by CPU time."""
    for contestant in contestants:
        contestant.cpu_rates.clear()
    timers: dict[str, Callable[[], float]] = {
        contestant.name: partial(contestant.rate, job) for contestant in contestants
    }
    by_wall = measure(timers, rounds=rounds, warmup=WARMUP_ROUNDS)
    by_cpu = {
        contestant.name: Measurement(
            contestant.cpu_rates[WARMUP_ROUNDS:], by_wall[contestant.name].others_cores
        )
        for contestant in contestants
    }
    return [
        *rows("loader", case, "samples/s", by_wall, {}),
        *rows("loader", f"{case}, CPU time", "samples/CPU s", by_cpu, {}),
    ]


def main() -> None:
    """Compare on generated pictures, photographs and emoji."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--save", action="store_true", help="keep rows and report in results/")
    arguments = parser.parse_args()
    install_peer()
    table: list[Row] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = prepare_cases(scratch)
        contestants = [Contestant(name) for name in ("ours", "open_clip", "webdataset")]
        for contestant in contestants:
            stack.callback(contestant.close)
        for case, (shards, side) in cases.items():
            tokenizer = str(scratch / "tiny" / "tokenizer.model")
            job = {"shards": shards, "image_size": side, "tokenizer": tokenizer, "seconds": arguments.seconds}
            table += compare(case, job, contestants, arguments.rounds)
    notes = [
        "one worker each, batches of 64, bicubic squash, 64 tokens of the same sentencepiece model; "
        "a CPU second counts the worker and the process that takes its batches",
        "the peers end in normalised float pixels, this project in uint8 patches that are normalised on the device",
        f"JPEG decoder of this project: {'simplejpeg' if find_spec('simplejpeg') else 'Pillow'}; of the peers: Pillow",
    ]
    finish(table, BASELINES, notes, save=arguments.save)


if __name__ == "__main__":
    main()
