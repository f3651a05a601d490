"""Small exchanges between ranks, on three gloo ranks and without a process group."""

import pytest
import torch

from siglip_train.distributed import collectives
from siglip_train.distributed.setup import init_world
from tests.ranks import run_ranks

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64]


def rows_of(rank, dtype):
    """`rank` rows, so that rank 0 has none."""
    return (torch.arange(rank * 2).reshape(rank, 2) + 10 * rank).to(dtype)


def exchange():
    world = init_world("cpu")
    rank = world.rank
    mismatched = ""
    try:
        collectives.gather_rows(torch.zeros(2, 3 if rank == 1 else 4))
    except ValueError as error:
        mismatched = str(error)
    collectives.barrier()
    return {
        "world": [world.rank, world.world_size, world.is_main, str(world.device)],
        "sum": collectives.sum_over_ranks({"seen": 10 + rank, f"bad/{rank}": 1}),
        "mean": collectives.mean_over_ranks({"loss": float(rank), **({"late": 6.0} if rank == 2 else {})}),
        "max": collectives.max_over_ranks({"seconds": -float(rank)}),
        "any": [collectives.any_rank(rank == 1), collectives.any_rank(False)],
        "broadcast": [
            collectives.broadcast_object({"rank": rank}),
            collectives.broadcast_object(rank, source=2),
        ],
        "objects": collectives.gather_objects(f"rank {rank}"),
        "rows": [collectives.gather_rows(rows_of(rank, dtype)).float() for dtype in DTYPES],
        "no rows": collectives.gather_rows(torch.zeros(0, 4, 2)),
        "scalars": collectives.gather_rows(torch.full((rank + 1,), float(rank), requires_grad=True)),
        "mismatched": mismatched,
    }


@pytest.mark.dist
def test_three_ranks_get_the_same_of_each_exchange():
    results = run_ranks(3, exchange)
    assert [result["world"] for result in results] == [[rank, 3, rank == 0, "cpu"] for rank in range(3)]
    for result in results:
        assert result["sum"] == {"seen": 33.0, "bad/0": 1.0, "bad/1": 1.0, "bad/2": 1.0}
        assert result["mean"] == {"loss": 1.0, "late": 6.0}
        assert result["max"] == {"seconds": 0.0}
        assert result["any"] == [True, False]
        assert result["broadcast"] == [{"rank": 0}, 2]
        assert result["objects"] == ["rank 0", "rank 1", "rank 2"]
        for dtype, rows in zip(DTYPES, result["rows"], strict=True):
            expected = torch.cat([rows_of(rank, dtype) for rank in range(3)]).float()
            assert torch.equal(torch.from_numpy(rows), expected), dtype
        assert result["no rows"].shape == (0, 4, 2)
        assert result["scalars"].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 2.0]
        assert "rows of one shape and dtype" in result["mismatched"]


def test_without_a_process_group_each_is_a_no_op():
    rows = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(collectives.gather_rows(rows), rows)
    assert not collectives.gather_rows(rows).requires_grad
    assert collectives.sum_over_ranks({"a": 2}) == {"a": 2.0}
    assert collectives.mean_over_ranks({"a": 2}) == {"a": 2.0}
    assert collectives.max_over_ranks({"a": 2}) == {"a": 2.0}
    assert collectives.gather_objects("x") == ["x"]
    assert collectives.broadcast_object("x") == "x"
    assert collectives.any_rank(True) is True
    assert collectives.any_rank(False) is False
    assert not collectives.is_distributed()
    collectives.barrier()
