"""Where this process stands among the others: reads the launcher's variables and starts torch.distributed."""

import atexit
import datetime
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

# NOTE: its functions take the group that exists when they are imported as a default argument. Imported later (by
# open_clip, by DeepSpeed) they would keep the group, and gloo's threads, alive after it is destroyed; a thread that
# then lets go of a tensor while the interpreter ends aborts the process
import torch.distributed.nn.functional

from siglip_train.distributed import flight_recorder
from siglip_train.distributed.peers import process_groups
from siglip_train.errors import UserError

Device = Literal["auto", "cpu", "cuda"]

# seconds that torch's own time-outs leave to ours, which know who is missing
_MARGIN = 120.0


@dataclass
class DistributedConfig:
    """How long ranks wait for one another, and for a run that is to stop.

    timeout_seconds: that a step may last on all ranks without one moving; then the one that all wait for is named,
    and all end. startup_timeout_seconds: the same of everything but a step (start-up, the first step, a checkpoint, an
    evaluation), and for all ranks to meet. grace_seconds: from a stop signal until the checkpoint begins.
    slow_rank_excess: share of a step by which a rank may lag behind the median one, in data or compute.
    slow_rank_logs: logs in a row at which a rank lags before a warning names it.
    """

    timeout_seconds: float = 600.0
    startup_timeout_seconds: float = 1800.0
    # assumption: Slurm's notice in README.md beside this file is 120 s
    grace_seconds: float = 100.0
    # assumption: less is noise of clocks and of caches
    slow_rank_excess: float = 0.2
    slow_rank_logs: int = 3

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.timeout_seconds, self.startup_timeout_seconds, self.grace_seconds) <= 0:
            raise ValueError("timeout_seconds, startup_timeout_seconds and grace_seconds must be above 0")
        if self.slow_rank_excess <= 0 or self.slow_rank_logs < 1:
            raise ValueError("slow_rank_excess must be above 0 and slow_rank_logs at least 1")

    @property
    def backstop(self) -> datetime.timedelta:
        """The time-out of torch's process groups, for what no thread of ours sees."""
        longest = max(self.timeout_seconds, self.startup_timeout_seconds)
        return datetime.timedelta(seconds=longest + _MARGIN)


@dataclass(frozen=True)
class World:
    """The ranks of a run and this process's place among them.

    local_rank: index of this rank on its machine, and of its GPU among the visible ones.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0


class _Launch(NamedTuple):
    rank: int
    world_size: int
    local_rank: int
    address: tuple[str, int] | None  # host and port where rank 0 listens; None = one process, alone


Met = Callable[[dist.Store, int, int], None]


def _ignore(_store: dist.Store, _rank: int, _world_size: int) -> None:
    pass


def launched_rank() -> int:
    """The rank that the launcher gave this process. Raises `UserError` where its variables are incomplete."""
    return _read_launch(os.environ).rank


def init_world(
    device: Device = "auto", config: DistributedConfig | None = None, *, met: Met = _ignore
) -> World:
    """Join the process group of this run (nccl on GPUs, else gloo) and return this rank's place.  # all ranks

    Reads torchrun's variables, or those of a Slurm step; with neither it is a world of one. The group exists even
    then, because DeepSpeed needs it. A group that is already there is used as it is.

    met: called where there are several, with the store, rank and number of ranks, before they wait for one another.
    Raises UserError for a missing GPU, incomplete variables or an unreachable rank 0.
    """
    launch = _one_gpu_per_task(_read_launch(os.environ), device)
    place = _choose_device(device, launch.local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        _join(launch, place, config or DistributedConfig(), met)
    # NOTE: the first collective must involve every rank; a point-to-point exchange as the first one can hang NCCL
    # (pytorch/pytorch#174288)
    dist.all_reduce(torch.zeros(1, device=place if dist.get_backend() == "nccl" else "cpu"))
    return World(dist.get_rank(), dist.get_world_size(), launch.local_rank, place)


def use_timeout_everywhere(config: DistributedConfig) -> None:
    """Give groups that libraries made the same time-out: they begin with torch's own, of 10 minutes for NCCL."""
    # the second is its name up to torch 2.13
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in process_groups():
        set_timeout(config.backstop, group)


def leave_world() -> None:
    """Take the process groups down, at the normal end of a run.  # all ranks"""
    if dist.is_initialized():
        dist.destroy_process_group()


def _read_launch(environment: Mapping[str, str]) -> _Launch:
    if "RANK" in environment and "WORLD_SIZE" in environment:
        launch = _read_torchrun(environment)
    elif "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        launch = _read_slurm(environment)
    else:
        launch = _Launch(0, 1, 0, None)
    if launch.rank >= launch.world_size:
        raise UserError(
            f"rank {launch.rank} of a world of {launch.world_size} cannot be: RANK and WORLD_SIZE (or SLURM_PROCID "
            "and SLURM_NTASKS) disagree; start the ranks with torchrun or srun"
        )
    return launch


def _read_torchrun(environment: Mapping[str, str]) -> _Launch:
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_rank = _number(environment, "LOCAL_RANK", default=0)
    if world_size == 1:
        return _Launch(rank, world_size, local_rank, None)
    if "MASTER_ADDR" not in environment:
        raise UserError(
            f"WORLD_SIZE is {world_size} but MASTER_ADDR is not set: start the ranks with torchrun or srun"
        )
    address = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT", default=29500)
    return _Launch(rank, world_size, local_rank, address)


def _read_slurm(environment: Mapping[str, str]) -> _Launch:
    rank, world_size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NTASKS")
    local_rank = _number(environment, "SLURM_LOCALID", default=0)
    if world_size == 1:
        return _Launch(rank, world_size, local_rank, None)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise UserError("no MASTER_ADDR and no SLURM_JOB_NODELIST to take it from: start the ranks with srun")
    # every rank must arrive at the same port, and two jobs on a machine at different ones
    derived = 20000 + _number(environment, "SLURM_JOB_ID", default=0) % 20000
    return _Launch(rank, world_size, local_rank, (host, _number(environment, "MASTER_PORT", default=derived)))


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: `gpu[007-012,20],cpu1` -> `gpu007`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else "")


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(
            f"the environment variable {name} is {text!r}, not a number: unset it or use torchrun"
        )
    return int(text)


def _one_gpu_per_task(launch: _Launch, device: Device) -> _Launch:
    """Under `srun --gpus-per-task=1` each rank sees one GPU, and calls it 0."""
    alone = device != "cpu" and "LOCAL_RANK" not in os.environ and torch.cuda.device_count() == 1
    return launch._replace(local_rank=0) if alone else launch


def _choose_device(device: Device, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={device} is not known: choose auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU on this machine: use device=cpu or device=auto")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine shows {count}; start {count} ranks on it"
        )
    return torch.device("cuda", local_rank)


def _join(launch: _Launch, place: torch.device, config: DistributedConfig, met: Met) -> None:
    host, port, store = _meet(launch, config)
    if launch.world_size > 1:
        met(store, launch.rank, launch.world_size)
    flight_recorder.switch_on()
    # libraries (DeepSpeed) read these, whatever the launcher was
    variables = {"RANK": launch.rank, "WORLD_SIZE": launch.world_size, "LOCAL_RANK": launch.local_rank}
    os.environ.update(
        {key: str(value) for key, value in variables.items()}, MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    per_node = re.fullmatch(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if per_node:
        # as torchrun does: the exchange of the sigmoid loss goes by it
        os.environ.setdefault("LOCAL_WORLD_SIZE", per_node[1])
    backend, bound = ("nccl", place) if place.type == "cuda" else ("gloo", None)
    rank, world_size = launch.rank, launch.world_size
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=config.backstop, device_id=bound
        )
    except dist.DistError as error:
        raise _unmet(launch, host, port, error) from error
    if backend == "gloo":
        # gloo's threads abort an interpreter that ends before them. NCCL only warns, and after an error on one
        # rank taking it down could wait for the others
        atexit.register(leave_world)


def _meet(launch: _Launch, config: DistributedConfig) -> tuple[str, int, dist.Store]:
    """Where the ranks meet, and the store they share: torchrun's, or else rank 0's."""
    if launch.address is None:
        # a store of one's own picks a free port, so that runs on one machine never meet
        alone = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        return "127.0.0.1", alone.port, alone
    host, port = launch.address
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            port,
            launch.world_size,
            is_master=launch.rank == 0 and not is_launchers,
            timeout=datetime.timedelta(seconds=config.startup_timeout_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise _unmet(launch, host, port, error) from error
    # the launcher's outlives an attempt
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return host, port, dist.PrefixStore(f"attempt {attempt}", store)


def _unmet(launch: _Launch, host: str, port: int, error: Exception) -> UserError:
    reason = str(error).splitlines()[0].rstrip(".")
    return UserError(
        f"rank {launch.rank} of {launch.world_size} could not join the others at {host}:{port}: {reason}. "
        "Check that every rank was started, and that MASTER_ADDR and MASTER_PORT are right and reachable"
    )
