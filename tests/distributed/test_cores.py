"""How many cores a rank has, from what the kernel, a container and a scheduler say."""

import os
from pathlib import Path

import pytest

from siglip_train.data.workers import worker_count
from siglip_train.distributed import cores
from siglip_train.distributed.cores import cores_of_rank


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 48 cores without quotas; the folder of its control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(48)))
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUP", tmp_path / "own")
    return tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 48),
        ({"LOCAL_WORLD_SIZE": "8"}, 6),
        ({"LOCAL_WORLD_SIZE": "96"}, 1),
        # srun, a task a rank, before and after init_world has set what torchrun would
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "5"}, 5),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "5",
             "RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
            5,
        ),
        # torchrun in the one task of a node
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "32",
             "RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
            4,
        ),
        # srun that says nothing of cores
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 12),
    ],
)  # fmt: skip
def test_ranks_of_a_machine_share_its_cores(
    machine: Path, environment: dict[str, str], expected: int
) -> None:
    assert cores_of_rank(environment) == expected


def version_1(quota: str) -> dict[str, str]:
    return {"cpu/job/cpu.cfs_quota_us": quota, "cpu/job/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 48),
        ("0::/", {"cpu.max": "800000 100000"}, 8),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        # the bound of a group above, and a path that this container does not see
        ("0::/pod/inner", {"pod/cpu.max": "650000 100000", "pod/inner/cpu.max": "max 100000"}, 6),
        ("0::/elsewhere", {"cpu.max": "400000 100000"}, 4),
        ("3:cpu,cpuacct:/job\n1:memory:/job", version_1("300000"), 3),
        ("3:cpu:/job", version_1("-1"), 48),
    ],
)  # fmt: skip
def test_a_quota_bounds_them(machine: Path, own: str, files: dict[str, str], expected: int) -> None:
    machine.with_name("own").write_text(own + "\n")
    for name, text in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(text + "\n")
    assert cores_of_rank({}) == expected
    assert cores_of_rank({"LOCAL_WORLD_SIZE": "2"}) == max(1, expected // 2)


def test_auto_takes_at_most_twelve_and_a_number_is_taken_as_it_is(machine: Path, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert worker_count("auto") == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert worker_count("auto") == 6
    assert worker_count(0) == 0
    assert worker_count(20) == 20
