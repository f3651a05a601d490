"""Runs of `siglip-train` on forked ranks, and how much one that met a fault has lost or done twice."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forks import run_program_by_rank

MODULE = "siglip_train.train"


def train(
    arguments: list[str],
    *,
    ranks: int,
    prepare: Callable[[int], None] | None = None,
    timeout: float = 120,
    may_crash: bool = False,
) -> list[subprocess.CompletedProcess[str]]:
    """`siglip-train` on forked ranks; a result for each.

    may_crash: a rank may end with a traceback, because another one was killed.
    """
    results = run_program_by_rank(MODULE, arguments, ranks=ranks, prepare=prepare, timeout=timeout)
    for rank, result in enumerate(results):
        assert may_crash or "Traceback" not in result.stderr, f"rank {rank}:\n{result.stderr}"
    return results


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step in metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def gone_on(run_dir: Path, straight_run: Path) -> dict[str, int]:
    """What a run that has met a fault and come to its end lost and repeated, for `record_fault`.

    Its losses must be those of the run that nothing happened to: then the same samples met the same weights.
    """
    expected, found = losses(straight_run), losses(run_dir)
    for step in expected.keys() & found.keys():
        # measured 1e-7 on two ranks
        assert found[step] == pytest.approx(expected[step], rel=1e-5), f"step {step}"
    batch = 24
    return {"lost": batch * len(expected.keys() - found.keys()), "repeated": repeated_steps(run_dir)}


def repeated_steps(run_dir: Path) -> int:
    """Steps that log.txt tells of more than once."""
    steps = re.findall(r"step (\d+)/\d+  loss", (run_dir / "log.txt").read_text())
    return len(steps) - len(set(steps))


def newest(run_dir: Path) -> str:
    """What LAST names."""
    return (run_dir / "checkpoints" / "LAST").read_text().strip()
