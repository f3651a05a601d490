"""What a config may name as an exchange. Loss and gradients over ranks: `tests/kernels`, `tests/objectives`."""

from dataclasses import replace

import pytest
import torch

from kernels.sigmoid_loss import Exchange
from siglip_train.distributed.ring import Ring, parse_exchange


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", Exchange()),
        ("ring", Exchange("ring")),
        ("all_gather", Exchange("all_gather")),
        ("node_ring", Exchange("node_ring")),
        ("node_ring:8", Exchange("node_ring", ranks_per_node=8)),
        ("grid:4x2", Exchange("grid", grid=(4, 2))),
    ],
)
def test_names_of_exchanges(name, expected):
    assert parse_exchange(name, "fp32") == expected
    assert parse_exchange(name, "bf16") == replace(expected, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "name", ["", "Ring", "ring:2", "grid", "grid:2", "grid:0x2", "node_ring:0", "auto:bf16"]
)
def test_what_names_no_exchange_is_refused(name):
    with pytest.raises(ValueError, match=r"exchange is|at least 1"):
        Ring(name, "fp32")


def test_what_names_no_dtype_is_refused():
    with pytest.raises(ValueError, match="exchange_dtype is 'fp8'"):
        Ring("auto", "fp8")
