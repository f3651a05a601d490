"""Places read from launchers' variables, and worlds that really come about."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from siglip_train.distributed import setup
from siglip_train.distributed.setup import first_host
from siglip_train.errors import UserError

SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41234567"}

JOIN = """
import json, os
from siglip_train.distributed.collectives import gather_objects
from siglip_train.distributed.setup import DistributedConfig, init_world
world = init_world(config=DistributedConfig(startup_timeout_seconds=60))
print(json.dumps({
    "place": [world.rank, world.world_size, world.local_rank], "device": world.device.type,
    "ranks": gather_objects(world.rank), "seen by libraries": os.environ["RANK"] + "/" + os.environ["WORLD_SIZE"],
    "port": int(os.environ["MASTER_PORT"]), "ranks a node": os.environ.get("LOCAL_WORLD_SIZE"),
}))
"""

LEAVE = """
import json, os
from siglip_train.distributed.setup import init_world, leave_world
def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)
init_world()
during = threads()
import open_clip
leave_world()
print(json.dumps([during, threads()]))
"""


def start(script=JOIN, **variables):
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM", "MASTER"))
        and key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("gpu[007-012,20],cpu1", "gpu007"),
        ("gpu[3,5-9]", "gpu3"),
        ("a1,a2,b[1-3]", "a1"),
        ("rack[1-2]-n[01-16].cluster", "rack1-n01.cluster"),
        ("ip-10-0-1-7,ip-10-0-1-8", "ip-10-0-1-7"),
        ("", ""),
    ],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, None)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "7"},
            (3, 4, 1, ("h", 7)),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, None)),
        ({**SLURM, "SLURM_JOB_NODELIST": "gpu[12-13]"}, (5, 8, 1, ("gpu12", 34567))),
        ({**SLURM, "SLURM_JOB_NODELIST": "a,b", "SLURM_STEP_NODELIST": "b"}, (5, 8, 1, ("b", 34567))),
        ({**SLURM, "MASTER_ADDR": "h", "MASTER_PORT": "7"}, (5, 8, 1, ("h", 7))),
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, (0, 1, 0, None)),
        (  # torchrun inside a Slurm job: the inner launcher counts
            {
                **SLURM,
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "MASTER_ADDR": "h",
                "MASTER_PORT": "7",
            },
            (1, 2, 1, ("h", 7)),
        ),
    ],
)
def test_place_from_the_launcher_s_variables(environment, expected):
    assert setup._read_launch(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "rank 2 of a world of 2"),
        (SLURM, "no SLURM_JOB_NODELIST"),
    ],
)
def test_incomplete_variables_are_refused(environment, message):
    with pytest.raises(UserError, match=message):
        setup._read_launch(environment)


def test_device_is_checked_against_the_machine(monkeypatch):
    with pytest.raises(UserError, match="choose auto, cpu or cuda"):
        setup._choose_device("gpu", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup._choose_device("auto", 0).type == "cpu"
    with pytest.raises(UserError, match="torch sees no GPU"):
        setup._choose_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert setup._choose_device("cpu", 0).type == "cpu"
    assert setup._choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="this machine shows 2"):
        setup._choose_device("cuda", 2)


def test_one_visible_gpu_per_slurm_task_is_number_0(monkeypatch):
    launch = setup._read_launch({**SLURM, "SLURM_JOB_NODELIST": "a"})
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert setup._one_gpu_per_task(launch, "auto").local_rank == 0
    assert setup._one_gpu_per_task(launch, "cpu").local_rank == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert setup._one_gpu_per_task(launch, "auto").local_rank == 1


@pytest.mark.dist
def test_worlds_of_one_and_a_slurm_step_of_two_come_about():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": str(port)}
    slurm["SLURM_STEP_TASKS_PER_NODE"] = "2(x1)"
    pair = [start(**slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]
    alone = [start(), start()]
    for rank, found in enumerate(map(finish, pair)):
        assert found["place"] == [rank, 2, rank]
        assert found["ranks"] == [0, 1]
        assert found["seen by libraries"] == f"{rank}/2"
        assert found["ranks a node"] == "2"
    first, second = map(finish, alone)
    assert first["place"] == [0, 1, 0]
    assert first["ranks"] == [0]
    assert first["device"] == "cpu"
    # two runs on one machine at the same time must not meet
    assert first["port"] != second["port"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads from /proc")
def test_no_thread_outlives_the_group_though_a_library_was_imported_meanwhile():
    during, after = finish(start(LEAVE))
    assert during > 0
    assert after == 0
