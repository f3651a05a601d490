"""The log of a rank ends with the reason for its end, whichever threads write to it."""

import faulthandler
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from siglip_train.supervision import rank_log
from siglip_train.supervision.rank_log import RankLog


@pytest.fixture
def stays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit statuses, in place of the end of this process."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def _lines(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().splitlines()


def test_a_second_thread_that_leaves_meanwhile_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: list[int]
) -> None:
    """A signal ends a rank while the watching thread learns that another has failed, and dumps stacks too."""
    log = RankLog(0, tmp_path)
    second = threading.Thread(target=log.leave, args=("another rank has failed", 1), kwargs={"stacks": True})
    dump = faulthandler.dump_traceback

    def dump_slowly(*arguments: Any) -> None:
        if second.ident is None:
            second.start()
            second.join(0.5)
        dump(*arguments)

    monkeypatch.setattr(faulthandler, "dump_traceback", dump_slowly)
    log.leave("SIGTERM", 143, stacks=True)
    second.join()
    lines = _lines(tmp_path)
    assert lines[-1].endswith("ERROR error: SIGTERM")
    assert sum("all threads stand at:" in line for line in lines) == 1
    assert stays[0] == 143


def test_a_message_that_comes_late_is_not_written(tmp_path: Path, stays: list[int]) -> None:
    log = RankLog(0, None)
    try:
        file = log.open(tmp_path)
        rank_log.log.info("a step")
        # the main thread has asked for the handlers before they are taken away
        late = logging.LogRecord("siglip_train", logging.INFO, "", 0, "one more step", None, None)
        log.leave("no rank has moved", 1, stacks=False)
        file.handle(late)
    finally:
        log.close()
    assert [line.split(" ", 3)[3] for line in _lines(tmp_path)] == ["a step", "error: no rank has moved"]
    assert stays == [1]
