# ruff: noqa: E501
"""One rank fails, dies, hangs or stands still: all ranks end, and say which one and where; then the run goes on."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults import injected
from tests.faults.injected import last_line, log_of
from tests.faults.runs import MODULE, gone_on, train
from tests.forks import run_program_by_rank

pytestmark = pytest.mark.dist

GONE_ON = "all ended and said why; went on"
# samples and steps of a run that was not started again
ENDED = {"lost": None, "repeated": None}


def _met(
    fault_run: list[str], run_dir: Path, fault: Callable, *, options: tuple[str, ...] = (),
    awaited: tuple[int, ...] | None = None,
) -> list:  # fmt: skip
    arguments = [*fault_run, f"run_dir={run_dir}", *options]
    return run_program_by_rank(MODULE, arguments, ranks=2, prepare=fault, timeout=120, awaited=awaited)


def _goes_on(fault_run: list[str], run_dir: Path, straight_run: Path) -> dict[str, int]:
    results = train([*fault_run, f"run_dir={run_dir}"], ranks=2)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    for rank in range(2):
        assert last_line(run_dir, rank).endswith("INFO ended: 240 of 240 samples seen")
    return gone_on(run_dir, straight_run)


@pytest.mark.parametrize(
    ("rank", "moment"),
    [(0, ("step", 5)), (1, ("step", 5)), (1, ("data", 6)), (0, ("checkpoint", 6)), (1, ("first step", 1))],
    ids=lambda value: str(value),
)
def test_an_error_of_one_rank_ends_all_with_its_reason(
    rank: int, moment: tuple[str, int], fault_run: list[str], straight_run: Path, tmp_path: Path, record_fault
) -> None:
    results = _met(fault_run, tmp_path, partial(injected.at, *moment, (rank,), injected.crash))
    assert [result.returncode for result in results] == [1, 1]
    reason = r"KeyError: 'a name that is not there'$"
    # of that rank the traceback stands in its log, as on the screen
    assert re.search(f"error: {reason}", last_line(tmp_path, rank))
    assert 'raise KeyError("a name that is not there")' in log_of(tmp_path, rank)
    assert "Traceback" in results[rank].stderr
    other = 1 - rank
    assert re.search(f"error: rank {rank} on .*: {reason}", last_line(tmp_path, other))
    assert "Traceback" not in results[other].stderr + log_of(tmp_path, other)
    assert len(re.findall(r"^error: rank", results[other].stderr, re.MULTILINE)) == 1
    goes_on = moment[0] == "checkpoint"
    record_fault(
        f"rank {rank} fails at {moment[0]} {moment[1]}",
        ranks=2,
        happened=GONE_ON if goes_on else "all ended and said why",
        **(_goes_on(fault_run, tmp_path, straight_run) if goes_on else ENDED),
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named_by_the_other(
    rank: int, fault_run: list[str], straight_run: Path, tmp_path: Path, record_fault
) -> None:
    results = _met(fault_run, tmp_path, partial(injected.at, "step", 5, (rank,), injected.die))
    assert [result.returncode for result in results] == ([-9, 1] if rank == 0 else [1, -9])
    # with rank 0 went the store, in which it said where it stood
    expected = (
        r"rank 1 on .*, last heard of at step [1-5].* \(.*\), is gone without a word"
        if rank
        else "rank 0 or the launcher, .* is gone"
    )
    assert re.search(f"error: {expected}", last_line(tmp_path, 1 - rank))
    assert "Traceback" not in results[1 - rank].stderr
    record_fault(
        f"rank {rank} is killed", ranks=2, happened=GONE_ON, **_goes_on(fault_run, tmp_path, straight_run)
    )


_LAST = r"on .*, last heard of at"
HANGS = {
    "rank 1 hangs in a step": (1, "step", injected.hang, rf"rank 1 {_LAST} step 5 \(.*hang\), is missing; rank 0 waits at step 5"),
    "rank 0 hangs in a step": (0, "step", injected.hang, rf"rank 0 {_LAST} step 5 \(.*hang\), is missing; rank 1 waits"),
    "rank 1 never gets its data": (1, "data", injected.hang, rf"rank 1 {_LAST} step 5, waiting for data \(.*\), is missing"),
    "rank 1 hangs in a checkpoint": (1, "checkpoint", injected.hang, rf"rank 1 {_LAST} step 4, checkpoint \(.*\), is missing"),
    "rank 1 stands still": (1, "step", injected.stop, rf"rank 1 {_LAST} step [1-5].* \(.*\), is silent, stopped or cut off; rank 0 waits"),
    "rank 0, with the store, stands still": (0, "step", injected.stop, r"nothing has moved for .* at step 5, and the store of all ranks, in rank 0"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "leaves_slowly"),
    [
        pytest.param("rank 1 hangs in a step", False, marks=pytest.mark.fault_by_default),
        ("rank 1 hangs in a step", True),
        *((what, False) for what in list(HANGS)[1:]),
    ],
)
def test_the_rank_that_all_wait_for_is_named(
    what: str, leaves_slowly: bool, fault_run: list[str], straight_run: Path, tmp_path: Path, record_fault
) -> None:
    rank, phase, fault, expected = HANGS[what]
    prepare = partial(injected.at, phase, 4 if phase == "checkpoint" else 5, (rank,), fault)
    if leaves_slowly:
        prepare = partial(injected.leaves_slowly, prepare)
    limits = ("distributed.timeout_seconds=6", "distributed.startup_timeout_seconds=30")
    other = 1 - rank
    ending = (0, 1) if fault is injected.hang else (other,)
    results = _met(fault_run, tmp_path, prepare, options=limits, awaited=ending)
    assert results[other].returncode == 1
    assert re.search(expected, last_line(tmp_path, other)), last_line(tmp_path, other)
    assert len(re.findall(r"^error: ", results[other].stderr, re.MULTILINE)) == 1
    for each in ending:
        assert results[each].returncode == 1
        # where it waited, and where the other hung
        assert "all threads stand at:" in log_of(tmp_path, each)
        assert ("in hang" in log_of(tmp_path, each)) == (each == rank)
        assert (tmp_path / "logs" / f"exchanges_rank_{each}").stat().st_size > 0
    goes_on = phase == "data"
    record_fault(
        what + (", rank 0 meets its end" if leaves_slowly else ""),
        ranks=2,
        happened=GONE_ON if goes_on else "all ended and said why",
        **(_goes_on(fault_run, tmp_path, straight_run) if goes_on else ENDED),
    )


def test_a_slow_rank_is_named(fault_run: list[str], straight_run: Path, tmp_path: Path, record_fault) -> None:
    """Rank 1 waits for each batch, so all do; the loss is the same."""
    results = _met(fault_run, tmp_path, injected.slow_data, options=("distributed.slow_rank_logs=2",))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert re.search(r"rank 1 on .* keeps all others waiting: its wait for data takes", log_of(tmp_path, 0))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    record = records[5]
    assert record["train/data_time_max_rank"] == 1
    assert record["train/data_time_max"] >= 1 > record["train/data_time"]
    assert record["train/exchange_time_max_rank"] == 0
    record_fault(
        "rank 1 is slow", ranks=2, happened="named, with its machine", **gone_on(tmp_path, straight_run)
    )
