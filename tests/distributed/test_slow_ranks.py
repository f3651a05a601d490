"""Which rank takes longest, and when one is warned of."""

import logging
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from siglip_train import loop
from siglip_train.distributed.ring import exchange_seconds
from siglip_train.distributed.setup import World
from siglip_train.distributed.slow_ranks import SlowRank, Times, largest


def _ranks(*, data: float = 0.1, compute: float = 1.0, slow: int = 2) -> list[Times]:
    """Four ranks whose steps take alike long: those that are quicker wait in the exchange."""
    own = [(data, compute) if rank == slow else (0.1, 1.0) for rank in range(4)]
    step = max(map(sum, own)) + 0.05
    return [Times(f"node{rank}", step, *(mine[0], step - sum(mine))) for rank, mine in enumerate(own)]


def test_the_largest_time_and_its_rank() -> None:
    found = largest(_ranks(compute=1.5))
    assert found["compute_time_max"] == pytest.approx(1.5)
    assert found["compute_time_max_rank"] == 2
    assert found["exchange_time_max"] == pytest.approx(0.55)
    assert found["exchange_time_max_rank"] == 0
    assert largest(_ranks()[:1]) == {}


@pytest.mark.parametrize(
    ("lag", "words"),
    [
        ({"compute": 1.5}, r"rank 2 .* its computation takes 1.5 s a step, the median rank's 1 s, at 3 logs"),
        ({"data": 0.6, "slow": 0}, r"rank 0 on node0 .* its wait for data takes 0.6 s a step, the median rank's 0.1 s"),
    ],
)  # fmt: skip
def test_a_rank_that_lags_is_named_once_until_it_has_caught_up(
    lag: dict, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    slow = SlowRank(0.2, 3)
    for _ in range(2):
        slow.seen(_ranks(**lag))
    slow.seen(_ranks())
    assert not caplog.records, "it did not last"
    for _ in range(7):
        slow.seen(_ranks(**lag))
    (message,) = (record.getMessage() for record in caplog.records)
    assert re.search(words, message), message
    slow.seen(_ranks(compute=1.1))
    for _ in range(3):
        slow.seen(_ranks(**lag))
    assert len(caplog.records) == 2
    caplog.clear()
    caplog.set_level(logging.WARNING)
    for _ in range(9):
        slow.seen(_ranks(compute=1.15))
    assert not caplog.records, "within the excess"


def test_waiting_for_a_late_rank_before_the_forward_pass_is_exchange_and_not_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the rank that waits would be named, as slow in compute, and not the one that it waits for."""
    monkeypatch.setattr(loop.dist, "all_reduce", lambda _: time.sleep(0.05))
    module = SimpleNamespace(counts=lambda _: {"pairs": 4})
    run: Any = SimpleNamespace(
        engine=SimpleNamespace(module=module), world=World(0, 2, 0, torch.device("cpu"))
    )
    exchange_seconds()
    assert loop.divisors(run, None) == {"pairs": 2}  # type: ignore[arg-type]
    assert exchange_seconds() >= 0.05
