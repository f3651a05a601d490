"""The loss over several ranks, by every form of exchange: equal to one process, as much sent as the cost model says,
overlapped, bounded in memory, and no hang on ranks that differ.
"""

import pytest
import torch
import torch.distributed as dist

from kernels import sigmoid_loss
from kernels.sigmoid_loss import Exchange
from kernels.sigmoid_loss.exchange.cost_model import Plan, Sizes, bytes_sent
from tests.kernels import exchange_cases
from tests.kernels.exchange_cases import WIDTH
from tests.kernels.test_sigmoid_loss import INIT, make
from tests.ranks import run_ranks

# (bytes of an element, of an element of gradients, of an id) in the order of exchange_cases.form_cases
SENT = [(8, 8, 0), (2, 4, 8), (2, 2, 0), (2, 4, 0)]
CAUSES = [
    "number of rows", "dtype", "dtype", "use of gradients", "pair ids or same_id_weight", "exchange", "exchange",
]  # fmt: skip
# in the order of exchange_cases.refusals_by_one
WRONG = [
    "B and E at least 1", "of one shape", "one floating-point dtype", "one floating-point dtype", "of shape () or (1,)",
    "logit_scale must be a tensor; got 10.0", "images must be a tensor; got [[", "go together", "int64 or narrower",
    "at least 0; got -1.0", "must be an Exchange, such as Exchange('ring'); got 'ring'",
]  # fmt: skip


def check_group(result, size):
    assert set(result["forms"]) == {
        exchange_cases.name_of(exchange) for exchange in exchange_cases.every_exchange(size)
    }
    for name, found in result["forms"].items():
        check_form(name, found, size)
    for name, (error, limit) in result["goldens"].items():
        assert error < limit, name
    for cause, message in zip(CAUSES, result["refusals"], strict=False):
        assert f"differ in {cause};" in message
    assert f"a grid of 5 x 1 has 5 ranks, the group has {size}" in result["refusals"][-2]
    assert f"5 ranks a node do not divide the {size} ranks" in result["refusals"][-1]


def check_form(name, found, size):
    form, grid, ranks_per_node = name
    for case, errors in found["errors"].items():
        assert max(errors.values()) < 1e-12, (name, case, errors)  # measured 1e-15
    assert max(found["fp32"].values()) < 2e-6, (name, found["fp32"])  # measured 2e-7
    # against the same rounded embeddings; gradients are fp32 on their way
    assert max(found["fp16"].values()) < 2e-6, (name, found["fp16"])  # measured 4e-7
    rounded = {"texts", "images"} if form == "grid" or form == "auto" else {"texts"}
    for kind, error in found["bf16"].items():
        # measured 4e-3: what travels is rounded at every hop; against the same rounded embeddings
        assert error < (8e-3 if kind in rounded else 1e-12), (name, kind, error)
    if form != "auto":
        plan = Plan(form, grid[0] if grid else 0)
        for sent, (element, gradient_element, id_bytes) in zip(found["sent"], SENT, strict=True):
            sizes = Sizes(size, ranks_per_node or size, 5, WIDTH, element, gradient_element, id_bytes)
            assert sent == bytes_sent(plan, sizes), name


@pytest.mark.dist
def test_two_ranks():
    results = run_ranks(2, exchange_cases.world_of_two)
    for result in results:
        check_group(result, 2)
    for message, cause in zip(results[0]["refusals_by_one"], WRONG, strict=True):
        assert cause in message
    assert all("another rank of the group" in message for message in results[1]["refusals_by_one"])
    late = [result["late"] for result in results]
    # rank 0 waits for rank 1, not the other way round; half the delay is left to a busy machine
    assert late[0][0] > 0.2
    assert late[1][0] < late[0][0]
    assert {again for _, again in late} == {0.0}
    for form in results[0]["waited"]:
        (rank0, again), (rank1, _) = (result["waited"][form] for result in results)
        assert rank0 > 0.07, form
        assert rank1 < rank0, form
        assert again == 0, form


@pytest.mark.dist
def test_four_ranks():
    for result in run_ranks(4, exchange_cases.world_of_four):
        check_group(result, 4)
        check_order(result["order"])
        assert result["forms"]["ring", None, None]["peak"] <= 10
        assert result["forms"]["node_ring", None, 2]["peak"] <= 14


@pytest.mark.dist
@pytest.mark.slow
def test_eight_ranks_and_groups_of_fewer():
    results = run_ranks(8, exchange_cases.world_of_eight, timeout=900)
    for size in (3, 4, 6, 7, 8):
        members = [result[size] for result in results if result[size] is not None]
        assert len(members) == size
        for result in members:
            check_group(result, size)
    assert all("not a member" in message for message in results[0]["stranger"])
    for result in results:
        check_nodes(result["nodes"])
    check_memory({size: results[7][size]["forms"] for size in (4, 7, 8)})
    for result in results[4:]:
        check_order(result["order"])


def check_nodes(found):
    # two by two: the whole world, two nodes wholly, a node and a half, halves of two nodes
    assert [found[0], *found[2:5]] == [2, 2, 1, 1]
    assert found[1] == "node_ring:2"
    assert "LOCAL_WORLD_SIZE=3 does not divide the 8 ranks" in found[5]


def check_memory(forms):
    """Blocks of n x E that are held at one time, whatever the number of ranks; the panels of the others grow."""

    def peak(size, form, grid=None, ranks_per_node=None):
        return forms[size][form, grid, ranks_per_node]["peak"]

    assert peak(4, "ring") == peak(7, "ring") == peak(8, "ring") <= 10
    nodes = peak(4, "node_ring", None, 2), peak(8, "node_ring", None, 2), peak(8, "node_ring", None, 4)
    assert max(nodes) <= 14
    assert peak(8, "all_gather") > peak(4, "all_gather") + 7
    assert peak(8, "grid", (2, 4)) < peak(8, "grid", (4, 2)) < peak(8, "grid", (8, 1))


def check_order(events):
    """The next message is on its way before the block in hand is computed."""
    assert events["ring"] == [
        "texts", "block of 2",
        "texts", "block of 5", "gradients",
        "texts", "block of 5", "gradients",
        "block of 5", "gradients",
        "block of 3",
    ]  # fmt: skip
    # what crosses nodes rides with what stays within one: a batch each, as NCCL runs batches one after another
    assert events["node_ring"] == [
        "texts + texts", "block of 1", "block of 2", "gradients", "block of 1",
        "texts", "block of 2", "block of 5", "gradients", "block of 3",
        "texts + gradients", "block of 1", "block of 3", "gradients", "block of 2",
    ]  # fmt: skip
    # own images against own texts, the visitor's against texts as they come; gradients leave as they are complete
    assert events["grid"] == [
        "texts", "texts",
        "block of 5", "block of 5",
        "block of 5", "gradients + gradients",
        "block of 5", "gradients",
    ]  # fmt: skip


def test_a_group_of_one_is_a_single_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        inputs = make(6, 6, 8, *INIT)
        assert sigmoid_loss(*inputs, group=dist.group.WORLD) == sigmoid_loss(*inputs)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "tree"}, "'tree' is not one of auto, ring"),
        ({"form": "grid"}, "a grid needs its rows and columns"),
        ({"form": "ring", "grid": (2, 1)}, "a grid needs its rows and columns"),
        ({"form": "grid", "grid": (0, 2)}, "must be integers of at least 1"),
        ({"form": "grid", "grid": (1, 2, 3)}, "must be integers of at least 1"),
        ({"form": "grid", "grid": (1, 2.0)}, "must be integers of at least 1"),
        ({"form": "node_ring", "ranks_per_node": -1}, "must be integers of at least 1"),
        ({"form": "node_ring", "ranks_per_node": 0}, "must be integers of at least 1"),
        ({"form": "grid", "grid": ()}, "must be integers of at least 1"),
        ({"form": "node_ring", "ranks_per_node": 1.5}, "must be integers of at least 1"),
        ({"links": 3}, "links must be Links"),
        ({"dtype": torch.float16}, "must be None or bfloat16"),
    ],
)
def test_an_exchange_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Exchange(**options)
