"""Training from a web server that fails in every way: the right samples, counted failures, bounded disk, no hang."""

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import SourceConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.loader import Loader
from siglip_train.data.shards.manifest import index_content, read_index
from siglip_train.data.shards.select import Selection
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import UserError
from siglip_train.evals.loader import EvaluationSource, build_evaluation_loader
from tests.data.faulty_server import Faults, serve
from tests.data.shard_files import write_index, write_shards
from tests.data.test_cache import most_on_disk
from tests.data.test_pipeline import Build
from tests.forks import run_program

SHARDS, EACH = 10, 6
TOTAL = SHARDS * EACH
NAMES = [f"{number:05d}.tar" for number in range(SHARDS)]
# two shards make a window
OPTIONS: dict[str, Any] = {"shuffle_window": 2 * EACH, "fetch_timeout_seconds": 5.0, "fetch_attempts": 4}


@pytest.fixture
def build(tokenizer: Tokenizer, transform: ImageTransform, cache: str) -> Build:
    """A maker of loaders."""
    return Build(tokenizer, transform, cache)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten shards of six samples with an index beside them."""
    write_shards(tmp_path / "in", [EACH] * SHARDS)
    write_index(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def server(folder: Path) -> Iterator[Faults]:
    """Serves the folder."""
    with serve(folder) as faults:
        yield faults


def _shards(server: Faults) -> str:
    return f"{server.url}/{{{NAMES[0][:-4]}..{NAMES[-1][:-4]}}}.tar"


def _loader(build: Build, server: Faults, **options: Any) -> Loader:
    return build(_shards(server), **{**OPTIONS, **options})


def _keys(loader: Loader, batches: int) -> list[str]:
    iterator = iter(loader)
    keys = [key for _ in range(batches) for key in next(iterator).keys]
    iterator.close()  # type: ignore[attr-defined]
    return keys


def _local_keys(build: Build, folder: Path, batches: int) -> list[str]:
    return _keys(build(f"{folder}/*.tar", **OPTIONS), batches)


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_that_pass_leave_no_trace_in_the_samples(
    build: Build, folder: Path, server: Faults, workers: int
):
    for name, faults in zip(
        NAMES,
        [
            ["stall"],
            ["drop", "drop"],
            ["short"],
            ["corrupt"],
            ["500"] * 3,
            ["silent"],
            ["plain"],
            ["429", "drop"],
        ],
        strict=False,
    ):
        server[name] = faults
    loader = _loader(build, server, workers=workers, fetch_timeout_seconds=1.5)
    keys = _keys(loader, 2 * TOTAL // 6)
    assert keys == _local_keys(build, folder, 2 * TOTAL // 6)
    assert Counter(keys) == dict.fromkeys(keys, 2)
    # more where a busy machine is silent of its own
    assert loader.counts.pop("fetch_retries") >= 12
    assert loader.counts == {"seen": 120, "source/all": 120}


def test_a_failed_shard_is_replaced_counted_and_comes_back(
    build: Build, server: Faults, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # 0.25 s, then 0.5 and 1
    monkeypatch.setattr("siglip_train.data.remote.failed._FIRST_DELAY", 0.05)
    server[NAMES[3]] = ["404"] * 3
    loader = _loader(build, server, max_bad_share=0.0)
    iterator = iter(loader)
    first = [key for _ in range(SHARDS) for key in next(iterator).keys]
    lost = EACH - sum(key.startswith(NAMES[3]) for key in first)
    assert 0 < lost <= EACH
    assert loader.counts["failed/all"] == loader.counts["substituted"] == lost
    assert loader.counts["failed_shards"] == 1
    assert not [name for name in loader.counts if name.startswith("bad/")]
    reader = loader._pieces.sources[0].reader
    _until(lambda: not reader.failed())
    assert server.gets()[NAMES[3]] == 4
    second = [key for _ in range(SHARDS) for key in next(iterator).keys]
    assert len(set(second)) == TOTAL
    assert loader.counts["failed/all"] == lost
    assert loader.counts["shards_back"] == 1
    iterator.close()  # type: ignore[attr-defined]
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if NAMES[3] in line]) == 2
    assert f"shard {NAMES[3]} is unavailable: HTTPError: HTTP Error 404: Not Found" in caplog.text
    assert f"shard {NAMES[3]} is back" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_failed_shards_stop_the_run_with_a_line_that_names_them(
    build: Build, server: Faults, workers: int
):
    for name in NAMES[2:5]:
        server[name] = ["403", "..."]
    assert len(_keys(_loader(build, server, max_failed_shards=0.3), 2 * SHARDS)) == 2 * TOTAL
    with pytest.raises(
        UserError, match=r"source all: [23] of 10 shards are unavailable, more than data\.max_fail"
    ) as stop:
        _keys(_loader(build, server, workers=workers, max_failed_shards=0.1), 3 * SHARDS)
    assert "\n" not in str(stop.value)
    assert str(stop.value).count("HTTP Error 403") >= 2


def test_one_shard_of_several_may_fail_unless_none_may(build: Build, server: Faults):
    server[NAMES[2]] = ["404", "..."]
    assert len(_keys(_loader(build, server), SHARDS)) == TOTAL
    with pytest.raises(UserError, match="1 of 10 shards are unavailable"):
        _keys(_loader(build, server, max_failed_shards=0.0), SHARDS)
    with pytest.raises(UserError, match="1 of 1 shards are unavailable"):
        _keys(build(f"{server.url}/{NAMES[2]}", **OPTIONS), 1)


def test_a_shard_that_breaks_the_promise_of_the_index_has_failed(
    build: Build, folder: Path, server: Faults, caplog: pytest.LogCaptureFixture
):
    path = folder / "index.json"
    entries = read_index(path.read_text())
    entries[NAMES[1]] = replace(entries[NAMES[1]], members={"json png txt": EACH + 1})
    path.write_text(json.dumps(index_content(entries.values())))
    loader = _loader(build, server)
    keys = _keys(loader, SHARDS)
    assert loader.counts["failed/all"] > 0
    assert not any(key.startswith(NAMES[1]) for key in keys)
    assert f"shard {NAMES[1]} is unavailable: it holds 6 complete samples instead of 7" in caplog.text
    # fetched whole again and again, it would never be right; the thread that reads ahead may find it at the same moment
    assert loader.counts["failed_shards"] in (1, 2)
    assert "is back" not in caplog.text


def test_a_shard_that_cannot_be_counted_is_left_out_of_the_run_and_of_its_resumes(
    build: Build, folder: Path, server: Faults, caplog: pytest.LogCaptureFixture
):
    (folder / "index.json").unlink()
    server[NAMES[2]] = ["404", "404"]
    loader = _loader(build, server)
    assert loader.unusable == {"shards_left_out": 1}
    assert loader.total_counts()["shards_left_out"] == 1
    assert (
        f"source all: this run goes without shard {NAMES[2]}, also after a resume: HTTPError" in caplog.text
    )
    iterator = iter(loader)
    first = [key for _ in range(4) for key in next(iterator).keys]
    state = json.loads(json.dumps(loader.state()))
    rest = [key for _ in range(SHARDS - 5) for key in next(iterator).keys]
    iterator.close()  # type: ignore[attr-defined]
    every = Counter(first + rest)
    assert len(every) == TOTAL - EACH
    assert set(every.values()) == {1}
    assert not any(key.startswith(NAMES[2]) for key in every)
    # the shard is back: a resume goes on in the same order, and a new run has it
    server[NAMES[2]] = []
    caplog.clear()
    resumed = build(_shards(server), state=state, **OPTIONS)
    assert "differ from those of the checkpoint" not in caplog.text
    assert resumed.state()["left_out"] == state["left_out"] == [f"{server.url}/{NAMES[2]}"]
    assert _keys(resumed, SHARDS - 5) == rest
    assert set(_keys(_loader(build, server), SHARDS)) > set(every)


def test_a_shard_that_comes_at_the_second_look_is_in_the_run(build: Build, folder: Path, server: Faults):
    (folder / "index.json").unlink()
    server[NAMES[2]] = ["404"]
    loader = _loader(build, server)
    assert not loader.unusable
    assert server.gets() == {**dict.fromkeys(NAMES, 1), NAMES[2]: 2}
    assert len(set(_keys(loader, SHARDS))) == TOTAL
    assert server.gets().total() == SHARDS + 1


def test_where_no_shard_came_there_is_no_second_look(build: Build, folder: Path, server: Faults):
    (folder / "index.json").unlink()
    for name in NAMES:
        server[name] = ["404", "..."]
    with pytest.raises(UserError, match="10 of 10 shards are unavailable"):
        _loader(build, server)
    assert server.gets() == dict.fromkeys(NAMES, 1)


def test_too_many_shards_that_cannot_be_counted_stop_the_start(build: Build, folder: Path, server: Faults):
    (folder / "index.json").unlink()
    for name in NAMES[2:4]:
        server[name] = ["404", "..."]
    said = r"source all: 2 of 10 shards are unavailable, more than data\.max_failed_shards 0\.1 allows: 00002.*404"
    with pytest.raises(UserError, match=said):
        _loader(build, server, max_failed_shards=0.1)
    assert len(set(_keys(_loader(build, server, max_failed_shards=0.2), SHARDS - 2))) == TOTAL - 2 * EACH
    with pytest.raises(UserError, match=r"source all: 1 of 1 shards are unavailable.*404"):
        build(f"{server.url}/{NAMES[2]}", **OPTIONS)


def test_where_none_may_fail_and_at_a_resume_a_shard_that_cannot_be_counted_stops_the_start(
    build: Build, folder: Path, server: Faults, tmp_path: Path
):
    (folder / "index.json").unlink()
    state = _loader(build, server).state()
    server[NAMES[2]] = ["404", "..."]
    elsewhere = {"cache_dir": str(tmp_path / "another")}
    for options in ({"max_failed_shards": 0.0}, {"state": state}):
        with pytest.raises(UserError, match=rf"^cannot read shard .*{NAMES[2]}.*404") as stop:
            _loader(build, server, **elsewhere, **options)
        assert "try again later, leave it out, or put an index.json beside the shards" in str(stop.value)
        assert "\n" not in str(stop.value)


def test_a_remote_shard_that_is_no_tar_is_left_out_and_not_kept(build: Build, folder: Path, server: Faults):
    (folder / "index.json").unlink()
    whole = (folder / NAMES[2]).read_bytes()
    (folder / NAMES[2]).write_bytes(b"<html>moved</html>")
    assert _loader(build, server).unusable == {"shards_left_out": 1}
    (folder / NAMES[2]).write_bytes(whole)
    assert not _loader(build, server).unusable


def test_an_evaluation_goes_on_without_a_failed_shard(
    server: Faults, transform: ImageTransform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("siglip_train.data.remote.locations.default_cache", lambda: tmp_path / "cache")
    server[NAMES[4]] = ["404", "..."]
    loader = build_evaluation_loader(EvaluationSource(_shards(server)), transform, batch_size=16)
    for _ in range(2):
        keys = [key for batch in loader for key in batch.keys if key]
        assert len(set(keys)) == TOTAL - EACH
    assert loader.counts == {"seen": 2 * TOTAL, "bad/shard unavailable": 2 * EACH}
    assert server.gets() == dict.fromkeys(NAMES, 1)


def test_an_index_saves_all_downloads_before_training(build: Build, folder: Path, server: Faults):
    loader = _loader(build, server)
    assert server.asked == ["GET index.json"]
    assert loader.fingerprint == build(f"{folder}/*.tar", **OPTIONS).fingerprint
    # which keys a shard holds is not in the index
    chosen = SourceConfig(_shards(server), select=Selection(keys=r"0000[0-4]"))
    assert len(build({"all": chosen}, RankShare(5), **OPTIONS)._pieces.sources[0].shards) == 5
    assert server.gets() == dict.fromkeys(NAMES, 1)


def test_without_an_index_shards_are_counted_once_even_where_copies_are_removed(
    build: Build, folder: Path, server: Faults, caplog: pytest.LogCaptureFixture
):
    (folder / "index.json").unlink()
    expected = _loader(build, server).fingerprint
    assert server.gets() == dict.fromkeys(NAMES, 1)
    assert "10 of 10 remote shards, such as 00000.tar, are in no index.json beside them" in caplog.text
    assert "siglip-data verify" in caplog.text
    shutil.rmtree(Path(build.cache) / "copies")
    server.asked.clear()
    loader = _loader(build, server)
    assert loader.fingerprint == expected
    assert sorted(server.asked) == ["GET index.json", *(f"HEAD {name}" for name in NAMES)]
    assert _keys(loader, SHARDS) == _local_keys(build, folder, SHARDS)


def test_a_resume_late_in_a_long_epoch_fetches_no_more_than_the_windows_at_hand(
    build: Build, server: Faults, monkeypatch: pytest.MonkeyPatch
):
    state = {**_loader(build, server).state(), "samples_seen": 42}
    order = _loader(build, server)._pieces.sources[0].order
    window = {NAMES[shard] for shard in order.shards_between(42, 48)}
    following = {NAMES[shard] for shard in order.shards_between(42, 48 + 12)}
    assert (len(window), len(following)) == (2, 4)
    server.asked.clear()
    monkeypatch.setattr("siglip_train.data.read_ahead._THREADS", 0)
    _keys(_loader(build, server, state=state), 1)
    assert server.gets() == dict.fromkeys(window, 1)
    assert server.gets("") == {"index.json": 1, **dict.fromkeys(window, 1)}
    monkeypatch.undo()
    shutil.rmtree(Path(build.cache) / "copies")
    server.asked.clear()
    iterator = iter(_loader(build, server, state=state))
    next(iterator)
    # the next window comes although nothing was read of it
    _until(lambda: set(server.gets()) == following)
    time.sleep(0.1)
    assert server.gets() == dict.fromkeys(following, 1)


def test_a_run_over_more_shards_than_fit_stays_within_the_limit(build: Build, folder: Path, server: Faults):
    size = max(entry.bytes for entry in read_index((folder / "index.json").read_text()).values())
    # what two windows and the samples in flight need
    limit = 8 * (-(-size // 4096) * 4096)
    options = {"cache_limit_gib": limit / 2**30, "workers": 1, "prefetch": 1}
    loader = _loader(build, server, **options)
    with most_on_disk(loader._pieces.sources[0].shards.cache) as most:
        keys = _keys(loader, 3 * SHARDS)
    assert keys == _local_keys(build, folder, 3 * SHARDS)
    assert 0.5 * limit < most[0] <= limit
    # so it was too little for all, and some were fetched again
    assert server.gets().total() > SHARDS
    assert not [fd for fd in _open_files() if "(deleted)" in fd and "copies" in fd]


def _open_files() -> list[str]:
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue
    return found


def test_a_limit_that_cannot_hold_two_windows_is_an_error_that_says_what_can(build: Build, server: Faults):
    with pytest.raises(
        UserError, match=r"cache_limit_gib 4.66e-05 .* two shuffle windows, which need (\S+):"
    ) as found:
        _loader(build, server, cache_limit_gib=50_000 / 2**30)
    needed = float(str(found.value).split("which need ")[1].split(":")[0])
    _loader(build, server, cache_limit_gib=needed * 1.01)


def test_reading_ahead_ends_with_the_iterator_whatever_the_server_does(build: Build, server: Faults):
    # one is read, so that there is a batch; the others never come
    shard = _loader(build, server)._pieces.sources[0].order.shards_between(0, 1)
    for name in set(NAMES) - {NAMES[each] for each in shard}:
        server[name] = ["silent", "..."]
    iterator = iter(_loader(build, server, fetch_timeout_seconds=60))
    next(iterator)
    assert [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    iterator.close()  # type: ignore[attr-defined]
    _until(lambda: not [thread for thread in threading.enumerate() if thread.name == "read-ahead"])


def test_a_training_run_over_a_faulty_web_ends_with_the_right_counts(
    tiny_data: Path, small_run: list[str], tmp_path: Path
):
    folder = tmp_path / "web"
    shutil.copytree(tiny_data / "train", folder)
    shards = sorted(path.name for path in folder.glob("*.tar"))
    write_index(folder)
    with serve(folder) as server:
        server[shards[0]] = ["stall"]
        server[shards[1]] = ["drop", "500"]
        arguments = [
            *small_run, f"run_dir={tmp_path}/run", "data.workers=2",
            f"data.sources.tiny.shards={[f'{server.url}/{name}' for name in shards]}",
            f"data.cache_dir={tmp_path}/cache",
            "data.fetch_timeout_seconds=1", "total_samples=96", "log.every_steps=4",
        ]  # fmt: skip
        result = run_program("siglip_train.train", arguments)
    assert result.returncode == 0, result.stderr
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    last = [record for record in records if "data/seen" in record][-1]
    assert last["data/seen"] == last["data/source/tiny"] == 96
    assert last["data/fetch_retries"] >= 1
    assert "trying again" in (tmp_path / "run" / "log.txt").read_text()
    assert not [name for name in last if name.startswith(("data/bad/", "data/failed"))]
