"""The harness interleaves, summarises and records as its reports claim."""

import csv
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.harness import (
    Measurement,
    append,
    measure,
    peak_resident_memory,
    ratio_table,
    reset_peak_resident_memory,
    rows,
    tree_cpu_seconds,
)


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    measurements = {"ours": Measurement([1.0, 2.0, 4.0], 0.0), "peer": Measurement([3.0, 4.0, 9.0], 0.5)}
    return rows("speed", "small", "ms/step", measurements, {"ours": 7.0})


def test_contestants_alternate_and_warmup_is_dropped():
    calls: list[str] = []

    def contestant(name: str):
        def run() -> float:
            calls.append(name)
            return float(len(calls))

        return run

    measured = measure({name: contestant(name) for name in "abc"}, rounds=3, warmup=1)
    rounds = [calls[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds} == {"a", "b", "c"}, "each is first now and then"
    assert (
        measured["a"].values == [float(3 * turn + one.index("a") + 1) for turn, one in enumerate(rounds)][1:]
    )


def test_quantiles_are_those_of_numpy():
    values = [5.0, 1.0, 9.0, 2.5, 7.0, 3.0]
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert Measurement(values, 0.0).quantile(share) == pytest.approx(np.quantile(values, share))


def test_rows_are_appended_and_other_columns_refused(table, tmp_path):
    append(table)
    path = append(table)
    with path.open() as file:
        kept = list(csv.DictReader(file))
    assert [row["contestant"] for row in kept] == ["ours", "peer", "ours", "peer"]
    assert (kept[0]["p50"], kept[0]["memory_mb"], kept[0]["unit"]) == ("2.0", "7", "ms/step")
    assert all(kept[0][column] for column in ("date", "revision", "hardware", "torch", "python"))
    path.write_text("something,else\n")
    with pytest.raises(ValueError, match="other columns"):
        append(table)


def test_ratio_is_how_many_times_as_fast(table):
    lines = ratio_table(table, {"ours": "peer"}).splitlines()
    assert "2.00 x peer" in lines[2], "4 ms of the peer against 2 ms"
    rates = [SimpleNamespace(**{**vars(row), "unit": "samples/s"}) for row in table]
    assert "0.50 x peer" in ratio_table(rates, {"ours": "peer"})


def test_a_contended_run_is_marked(table):
    text = ratio_table(table, {})
    ours, peer = text.splitlines()[2:4]
    assert "!" not in ours
    assert "!" in peer
    assert "quiet machine" in text


def test_cpu_time_of_children_is_counted():
    before = tree_cpu_seconds()
    busy = "import time\nstart = time.process_time()\nwhile time.process_time() - start < 0.3: pass\ninput()"
    child = subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while tree_cpu_seconds(child.pid) < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        # a clock of 10 ms ticks: two readings of it are off by one
        assert tree_cpu_seconds(child.pid) > 0.28
        assert tree_cpu_seconds() - before > 0.28
    finally:
        child.communicate(b"\n")
    assert tree_cpu_seconds() - before > 0.28, "an ended child still counts"


def test_the_peak_of_memory_begins_anew_when_it_is_reset():
    megabytes = 200
    block = b"x" * (megabytes * 2**20)  # written to, so that it is resident
    before = peak_resident_memory()
    del block
    # the kernel adds up its counters now and then
    assert peak_resident_memory() > before - megabytes / 10
    reset_peak_resident_memory()
    assert peak_resident_memory() < before - megabytes / 2
