"""Workers that are killed, stopped or stuck are replaced; the batches are those of a run where nothing happened."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from siglip_train.data import watchdog
from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import DataConfig, SourceConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.loader import Loader
from siglip_train.data.pipeline import build_loader
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import UserError
from siglip_train.evals.loader import EvaluationSource, build_evaluation_loader
from tests.data.conftest import encoded, picture
from tests.data.run_inputs import inputs_of
from tests.data.shard_files import sample, write_tar
from tests.data.trap import ODD, Deadly, Trap

# long enough for a worker to start on a busy machine
STALL = 5.0


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Forty samples; number 21 is of odd size."""
    rows = [sample(f"{i:02d}", i) for i in range(40)]
    rows[21] = sample("21", png=encoded(picture(21, ODD)))
    for shard in range(2):
        members = [member for row in rows[20 * shard : 20 * shard + 20] for member in row]
        write_tar(tmp_path / "in" / f"{shard}.tar", members)
    return str(tmp_path / "in" / "*.tar")


class Build:
    """Builds loaders in file order, four samples a batch."""

    def __init__(self, shards: str, tokenizer: Tokenizer, cache: str) -> None:
        self.shards, self.tokenizer, self.cache = shards, tokenizer, cache

    def __call__(
        self, transform: ImageTransform | None = None, *, state: dict[str, Any] | None = None, **options: Any
    ) -> Loader:
        sources = {"all": SourceConfig(self.shards)}
        config = DataConfig(
            sources,
            **{"order": "sequential", "workers": 2, "prefetch": 2, "stall_seconds": STALL, **options},
            cache_dir=self.cache,
        )
        return build_loader(
            config,
            inputs=inputs_of(config, transform or ImageTransform(16, 8), self.tokenizer),
            share=RankShare(4),
            seed=0,
            state=state,
        )


@pytest.fixture
def build(shards: str, tokenizer: Tokenizer, cache: str) -> Build:
    """A maker of loaders."""
    return Build(shards, tokenizer, cache)


def _keys(iterator: Iterator[Any], batches: int) -> list[str]:
    return [key for _ in range(batches) for key in next(iterator).keys]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_killed_and_stopped_workers_are_replaced_and_nothing_is_lost(
    build: Build, number: signal.Signals, caplog: pytest.LogCaptureFixture
):
    expected = _keys(iter(build(workers=0)), 12)
    loader = build()
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    got = _keys(iterator, 3)
    victim, other = sorted(set(multiprocessing.active_children()) - before, key=lambda child: child.pid)
    os.kill(victim.pid, number)
    assert got + _keys(iterator, 9) == expected
    assert loader.counts["workers_replaced"] == 1
    assert loader.counts["seen"] == 48
    (message,) = [r.getMessage() for r in caplog.records if "workers are replaced" in r.getMessage()]
    told = f"worker {victim.pid} was killed by SIGKILL" if number == signal.SIGKILL else "nothing came for 5"
    assert told in message
    for process in (victim, other):
        process.join(20)
        assert process.exitcode == -signal.SIGKILL


def test_a_worker_stuck_in_a_sample_is_replaced_once(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trap = Trap(16, 8)
    trap.caught = tmp_path / "caught"
    loader = build(trap)
    assert _keys(iter(loader), 10) == _keys(iter(build(workers=0)), 10)
    assert trap.caught.exists()
    assert loader.counts["workers_replaced"] == 1
    assert "sample 21 of the run, 1.tar/21 of source all" in caplog.text


def _trap(kind: str) -> tuple[ImageTransform, dict[str, Any]]:
    return (Deadly(16, 8), {}) if kind == "kills its worker" else (Trap(16, 8), {"stall_seconds": 2.5})


@pytest.mark.parametrize(
    "kind", ["kills its worker", pytest.param("never comes back", marks=pytest.mark.slow)]
)
def test_a_sample_that_ends_its_worker_each_time_is_left_out(
    build: Build, kind: str, caplog: pytest.LogCaptureFixture, record_fault
):
    transform, options = _trap(kind)
    loader = build(transform, workers=1, max_bad_share=0.5, **options)
    iterator = iter(loader)
    keys = _keys(iterator, 12)
    assert loader.counts["workers_replaced"] == 3
    assert loader.counts["quarantined"] == 1
    # in its place comes another, as for any bad sample; it would have come again in the second pass
    assert keys.count("1/21") == keys.count("21") == 0
    assert len(keys) == loader.counts["seen"] == 48
    assert loader.counts["bad/ends its worker"] == loader.counts["substituted"] == 1
    (message,) = [r.getMessage() for r in caplog.records if "is left out from now on" in r.getMessage()]
    assert message.startswith("sample 1.tar/21 of source all has ended its worker three times")
    state = loader.state()
    iterator.close()  # type: ignore[attr-defined]
    # nothing but the position and what is left out decides which samples come: of any number of workers, also of none
    caplog.clear()
    state["quarantine"] = json.loads(json.dumps(state["quarantine"]))
    resumed = build(transform, workers=0, max_bad_share=0.5, state={**state, "samples_seen": 0, "counts": {}})
    assert _keys(iter(resumed), 24)[:48] == keys
    assert resumed.counts["bad/ends its worker"] == 2
    assert resumed.state()["quarantine"] == state["quarantine"]
    assert "is left out from now on" not in caplog.text
    record_fault(
        f"a sample {kind} each time", ranks=1, happened="left out, counted and named", lost=0, repeated=0
    )


def test_where_every_sample_ends_its_worker_the_run_ends(build: Build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchdog, "_LEFT_OUT_IN_A_ROW", 1)
    transform = Deadly(16, 8)
    transform.always = True
    loader = build(transform, workers=1)
    before = set(multiprocessing.active_children())
    message = (
        r"replaced 3 times .* through sample \d of the run, 0\.tar/\d\d of source all .*was killed by SIGKILL"
    )
    with pytest.raises(UserError, match=message):
        next(iter(loader))
    deadline = time.monotonic() + 20
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() < deadline, "workers that are given up are still there"
        time.sleep(0.05)


def test_an_error_inside_a_worker_is_an_error_and_no_loss(build: Build, caplog: pytest.LogCaptureFixture):
    loader = build(workers=1)
    (captions, _) = loader.sources[0].inputs
    captions._tokenizer = "no tokenizer"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="not callable"):
        next(iter(loader))
    assert "replaced" not in caplog.text
    assert loader.counts["workers_replaced"] == 0


def test_evaluation_goes_on_after_a_worker_was_killed(shards: str):
    def run(*, kill: bool) -> list[str]:
        loader = build_evaluation_loader(
            EvaluationSource(shards), ImageTransform(16, 8), batch_size=3, workers=2
        )
        before, keys = set(multiprocessing.active_children()), []
        for number, batch in enumerate(loader):
            keys += batch.keys
            if kill and number == 2:
                os.kill((set(multiprocessing.active_children()) - before).pop().pid, signal.SIGKILL)
        assert loader.counts["seen"] == 40
        return keys

    assert run(kill=True) == run(kill=False)


def test_stall_seconds_must_be_above_0():
    with pytest.raises(ValueError, match="stall_seconds"):
        DataConfig(stall_seconds=0)
