"""How many cores of its machine a rank may use, as the kernel, the container and the scheduler say."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def cores_of_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The cores that this rank may use, at least 1.

    Those of this process, by its affinity and by the quota of its container, are shared by the ranks of the machine
    (torchrun's LOCAL_WORLD_SIZE). A rank that is a Slurm task has SLURM_CPUS_PER_TASK for itself; where it is one of
    several within a task, they share those.
    """
    usable = min([len(os.sched_getaffinity(0)), *_quotas()])
    per_task = int(environment.get("SLURM_CPUS_PER_TASK") or 0)
    if per_task:
        usable = min(usable, per_task)
        if _is_slurm_task(environment):
            return usable
    return max(1, usable // int(environment.get("LOCAL_WORLD_SIZE") or 1))


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this rank, and not torchrun within a task."""
    place = environment.get("SLURM_PROCID"), environment.get("SLURM_NTASKS")
    return place == (environment.get("RANK", place[0]), environment.get("WORLD_SIZE", place[1]))


def _quotas() -> Iterator[int]:
    """Whole cores that each control group above this process grants, where it grants no more than so many."""
    for group in _groups():
        try:
            quota, period = _quota(group)
        except (OSError, ValueError):
            # another version of control groups, or `max`: no bound
            continue
        if quota > 0:
            yield max(1, quota // period)


def _groups() -> Iterator[Path]:
    """Folders of this process's groups up to the root, of version 2, and of version 1's `cpu`."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        inner = root / path.lstrip("/")
        # a container sees its own group as the root, whatever the path says
        yield from dict.fromkeys(
            [inner, *(parent for parent in inner.parents if root in parent.parents), root]
        )


def _quota(group: Path) -> tuple[int, int]:
    """Microseconds of a core, and in how many of the clock."""
    if (group / "cpu.max").exists():
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota), int(period)
    return tuple(int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))  # type: ignore[return-value]
