"""Whatever the data, ranks and workers: a run that is stopped and goes on sees what an uninterrupted one sees."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import DataConfig, SourceConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.loader import Loader
from siglip_train.data.mixture import StageConfig
from siglip_train.data.pipeline import build_loader
from siglip_train.data.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.data.killed_run import SIZE, loader_of
from tests.data.run_inputs import inputs_of
from tests.data.shard_files import Member, sample, without, write_shards, write_tar
from tests.tiers import one_in

CASES = range(45)
# one case in so many has worker processes, which take longer to start than all else takes
WITH_WORKERS = 15
RANKS = (1, 2, 3, 4)


@functools.cache
def _members(key: str, kind: str) -> list[Member]:
    """A sample, most of them good, some that cannot be used and some that no one knows are bad before they are read."""
    number = int(key) % 7
    changed = {
        "broken image": {"png": b"no image"},
        "empty caption": {"txt": b" "},
        "broken json": {"json": b"{"},
    }
    members = sample(key, number, **changed.get(kind, {}))
    return without(members, "txt") if kind == "no text" else members


def _write_source(random: Random, folder: Path, samples: int) -> str:
    """Shards of uneven sizes, some of them empty, with at least so many good samples."""
    kinds = ["good"] * 20 + ["broken image", "empty caption", "broken json", "no text"]
    good = shard = number = 0
    while good < samples:
        rows = []
        for _ in range(random.choice((0, 1, 9, 17))):
            kind = random.choice(kinds)
            good += kind == "good"
            rows.append(_members(f"{number:04d}", kind))
            number += 1
        write_tar(folder / f"{shard:03d}.tar", [member for row in rows for member in row])
        shard += 1
    return str(folder / "*.tar")


class Case:
    """A set-up drawn at random, and loaders of it."""

    def __init__(self, random: Random, folder: Path, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = random.choice((12, 24))
        self.batches = random.randint(7, 12)
        names = ["a", "b", "c"][: random.randint(1, 3)]
        sources = {
            name: SourceConfig(
                _write_source(random, folder / name, random.randint(self.size, 3 * self.size)),
                weight=random.choice((1, 0.3, 0.01, 7)),
                language=random.choice(("json:number", f"of {name}", None)),
            )
            for name in names
        }
        begins = random.sample(range(1, self.batches), random.choice((0, 0, 1, 2)))
        self.options = {
            "sources": sources,
            "stages": [
                StageConfig(
                    begin * self.size - random.randrange(self.size),
                    {name: random.choice((0.0, 1.0, 0.2)) for name in names} | {random.choice(names): 0.5},
                )
                for begin in sorted(begins)
            ],
            "shuffle_window": random.choice((1, 5, 20, 1000)),
            "order": random.choice(("shuffled", "shuffled", "sequential", "resampled")),
            "cache_dir": str(folder / "cache"),
            "max_bad_share": 1.0,
        }

    def loader(self, *, rank: int, ranks: int, workers: int, state: dict[str, Any] | None) -> Loader:
        config = DataConfig(**self.options, workers=workers)
        return build_loader(
            config,
            inputs=inputs_of(config, ImageTransform(16, 8), self.tokenizer),
            share=RankShare(self.size, rank, ranks),
            seed=3,
            state=state,
        )

    def read(
        self, batches: int, *, ranks: int = 1, workers: int = 0, state: dict[str, Any] | None = None
    ) -> tuple[list[str], dict[str, Any]]:
        """The keys of the next global batches, in order, and the state after them as a checkpoint holds it."""
        shares, states, counts = [], [], Counter()
        for rank in range(ranks):
            loader = self.loader(rank=rank, ranks=ranks, workers=workers, state=state)
            iterator = iter(loader)
            shares.append([next(iterator).keys for _ in range(batches)])
            states.append(loader.state())
            counts.update(states[-1]["counts"])
        keys = [key for number in range(batches) for share in shares for key in share[number]]
        assert len({(each["samples_seen"], each["fingerprint"]) for each in states}) == 1
        return keys, json.loads(json.dumps({**states[0], "counts": counts}))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("number", one_in(7, CASES))
def test_a_run_that_stops_and_goes_on_is_the_uninterrupted_run(
    number: int, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    random = Random(number)
    case = Case(random, tmp_path, tokenizer)
    expected, end = case.read(case.batches)
    monkeypatch.setattr("siglip_train.data.batch_pieces._PIECE", random.choice((256, 5)))
    stops = sorted(random.sample(range(1, case.batches), random.randint(1, 2)))
    got, state = [], None
    for begin, stop in zip([0, *stops], [*stops, case.batches], strict=True):
        workers = random.randint(1, 3) if number % WITH_WORKERS == 0 else 0
        keys, state = case.read(
            stop - begin, ranks=random.choice(RANKS[: 4 - workers]), workers=workers, state=state
        )
        got += keys
    assert got == expected
    assert state == end
    counts = Counter(state["counts"])
    assert counts["seen"] == len(expected) == case.size * case.batches
    assert sum(count for name, count in counts.items() if name.startswith("source/")) == len(expected)


def test_the_cases_are_of_every_kind(tmp_path: Path, tokenizer: Tokenizer):
    cases = [Case(Random(number), tmp_path / str(number), tokenizer) for number in CASES[:20]]
    kinds = Counter(
        kind
        for case in cases
        for kind in (
            f"{len(case.options['sources'])} sources",
            f"{len(case.options['stages'])} stages",
            case.options["order"],
        )
    )
    assert len(kinds) == 9


def _wait_for_batches(process: subprocess.Popen, out: Path, batches: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "the run makes no batches"
        if out.exists() and len(json.loads(out.read_text())["keys"]) >= SIZE * batches:
            return
        time.sleep(0.02)


def test_two_kills_of_a_run_with_workers(tmp_path: Path, sentencepiece_model: Path, tokenizer: Tokenizer):
    shards = [write_shards(tmp_path / "often", [9, 14, 6]), write_shards(tmp_path / "seldom", [5, 8])]
    place = {"shards": shards, "tokenizer": str(sentencepiece_model), "cache": str(tmp_path / "cache")}
    saved: dict[str, Any] = {"state": None, "keys": []}
    for workers, batches in ((2, 7), (1, 16)):
        out, arguments = tmp_path / f"{batches}.json", tmp_path / "arguments.json"
        arguments.write_text(json.dumps({**place, **saved, "workers": workers, "out": str(out)}))
        command = [sys.executable, "-m", "tests.data.killed_run", str(arguments)]
        with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
            _wait_for_batches(process, out, batches)
            process.send_signal(signal.SIGKILL)
        saved = json.loads(out.read_text())
    parts = []
    for rank in range(2):
        iterator = iter(loader_of(**place, workers=1 + rank, state=saved["state"], rank=rank, ranks=2))
        parts.append([next(iterator).keys for _ in range(5)])
    keys = saved["keys"] + [key for pair in zip(*parts, strict=True) for part in pair for key in part]

    uninterrupted = loader_of(**place, workers=0)
    iterator = iter(uninterrupted)
    assert keys == [key for _ in range(len(keys) // SIZE) for key in next(iterator).keys]
    assert saved["state"]["counts"]["seen"] == saved["state"]["samples_seen"] == len(saved["keys"])
    assert saved["state"]["fingerprint"] == uninterrupted.fingerprint


def test_a_resume_late_in_a_long_epoch_reads_one_window_at_most(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    shards, per_shard, window, size = 60, 20, 100, 10
    pattern = write_shards(tmp_path / "in", [per_shard] * shards)
    config = DataConfig(
        {"all": SourceConfig(pattern)}, workers=0, shuffle_window=window, cache_dir=str(tmp_path / "cache")
    )
    build = functools.partial(
        build_loader,
        config,
        inputs=inputs_of(config, ImageTransform(16, 8), tokenizer),
        share=RankShare(size),
        seed=0,
    )
    # the sixth batch of the tenth window of 100 samples, which are five shards
    samples_seen = 9 * window + 5 * size
    state = {**build().state(), "samples_seen": samples_seen}
    epoch = build()
    iterator = iter(epoch)
    windows = [{key.split("/")[0] for _ in range(10) for key in next(iterator).keys} for _ in range(10)]
    assert [len(shards) for shards in windows] == [5] * 10

    opened, read = set(), []

    def spy_open(path: Any, *rest: Any, **named: Any) -> int:
        opened.add(Path(path).name)
        return real_open(path, *rest, **named)

    def spy_pread(*arguments: Any) -> bytes:
        read.append(len(data := real_pread(*arguments)))
        return data

    real_open, real_pread = os.open, os.pread
    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "pread", spy_pread)
    next(iter(build(state=state)))
    # not even a header of the 55 other shards: their indexes lie in the cache
    assert opened
    assert {name for name in opened if name.endswith(".tar")} <= windows[9]
    assert 0 < sum(read) <= sum((tmp_path / "in" / name).stat().st_size for name in windows[9])
