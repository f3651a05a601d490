"""What one rank tells the others of its end."""

import json
import time

import pytest
import torch.distributed as dist

from siglip_train.distributed import peers
from siglip_train.distributed.peers import Failure, Peers
from siglip_train.distributed.standing import Standing
from tests.forks import free_port


def test_a_rank_does_not_follow_what_it_has_told_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that told it ends the rank, with the reason as it is, not as that of a peer."""
    monkeypatch.setattr(peers, "_EVERY", 0.05)
    monkeypatch.setattr(peers, "_LINGER", 1.0)
    store = dist.TCPStore("127.0.0.1", free_port(), world_size=1, is_master=True)
    left: list[Failure] = []
    watch = Peers(store, 0, 2, standing=Standing(), timeouts=(60.0, 60.0), leave=left.append)
    watch.tell(Failure("SIGTERM", 143, hangs=True))
    # its thread has looked at the store by then, and has ended
    deadline = time.monotonic() + 20
    while watch._threads[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    watch.close()
    assert json.loads(store.get("failure"))[0].endswith(": SIGTERM")
    assert left == []
