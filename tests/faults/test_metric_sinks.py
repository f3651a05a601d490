"""Numbers that cannot be written, by a full disk or for want of a key: the run goes on, and they are written later."""

import errno
import itertools
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from siglip_train import sinks
from siglip_train.errors import UserError
from siglip_train.metrics import LogConfig, MetricWriter
from tests.faults.runs import gone_on, train


class _FullDisk:
    """A file on a disk that is full while `full`: it takes the first half of a line, as disks do."""

    full = True

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, line: bytes) -> int:
        if not _FullDisk.full:
            return self._file.write(line)
        if len(line) % 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(line[: len(line) // 2])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_that_the_disk_had_no_room_for_is_written_later_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    writer = MetricWriter(tmp_path, LogConfig(), resumed_step=0, run_config={})
    writer.write(1, 10, {"train/loss": 2.0})
    place = writer._sinks[0]._place
    place._file = _FullDisk(place._file)  # type: ignore[attr-defined]
    monkeypatch.setattr(_FullDisk, "full", True)
    # lines of both lengths: the disk refuses one and takes half of the other
    writer.write(2, 20, {"train/loss": 2.0})
    writer.write(3, 30, {"train/loss": 2.25})
    assert [record["step"] for record in _lines(tmp_path)] == [1]
    monkeypatch.setattr(_FullDisk, "full", False)
    writer.write(4, 40, {"train/loss": 2.0})
    writer.close()
    assert [(record["step"], record["samples_seen"]) for record in _lines(tmp_path)] == [
        (1, 10), (2, 20), (3, 30), (4, 40)
    ]  # fmt: skip
    messages = [record.getMessage() for record in caplog.records]
    (failed,) = [message for message in messages if "the run goes on" in message]
    assert failed.startswith("metrics.jsonl: OSError:")
    assert "metrics.jsonl: works again, 3 records were owed" in messages


def _fill_the_disk(rank: int) -> None:
    """The disk is full for four steps from the third on, and again when the report is written."""
    write, attempts = sinks.JsonLines.write, itertools.count(1)

    def full(self: sinks.JsonLines, record: sinks.Record) -> None:
        if 3 <= next(attempts) <= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, record)

    def no_report(_: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    sinks.JsonLines.write = full  # type: ignore[method-assign]
    from siglip_train import train as program

    program.write_report = no_report


@pytest.mark.dist
def test_a_disk_that_is_full_for_a_while(
    fault_run: list[str], straight_run: Path, tmp_path: Path, record_fault
) -> None:
    results = train([*fault_run, f"run_dir={tmp_path}"], ranks=2, prepare=_fill_the_disk)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    log = (tmp_path / "log.txt").read_text()
    assert [record["step"] for record in _lines(tmp_path)] == list(range(1, 11))
    assert log.count("metrics.jsonl: OSError: [Errno 28]") == 1
    assert "report: none, OSError: [Errno 28] No space left on device" in log
    record_fault(
        "the disk is full while metrics are written", ranks=2, happened="went on",
        **gone_on(tmp_path, straight_run),
    )  # fmt: skip


class _Service:
    """Weights & Biases as it is without a key, until there is one."""

    def __init__(self) -> None:
        self.has_key = False
        self.asked = 0
        self.logged: list[int] = []
        self.settings: Any = None

    def Settings(self, **options: Any) -> dict[str, Any]:  # its name there
        return options

    def init(self, *, settings: Any, **_: Any) -> SimpleNamespace:
        self.asked += 1
        self.settings = settings
        if not self.has_key:
            raise RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")
        return SimpleNamespace(log=self._log, finish=lambda: None)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append(step)


def test_without_a_key_for_wandb_the_run_goes_on_and_records_are_sent_once_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, record_fault
) -> None:
    service, now = _Service(), [1000.0]
    monkeypatch.setitem(sys.modules, "wandb", service)  # type: ignore[arg-type]
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now[0])
    writer = MetricWriter(tmp_path, LogConfig(wandb="online"), resumed_step=0, run_config={})
    assert service.asked == 1, "it is known before the first step"
    assert service.settings == {"x_disable_meta": True}, "the command line may hold a password"
    for step in range(1, 21):
        now[0] += 2
        writer.write(step, 10 * step, {"train/loss": 2.0})
    # 40 seconds: after 10 and 30
    assert service.asked == 3
    assert caplog.text.count("Weights & Biases: RuntimeError: api_key not configured") == 1
    service.has_key = True
    now[0] += 3600
    writer.write(21, 210, {"train/loss": 2.0})
    writer.close()
    assert service.logged == list(range(1, 22))
    assert len(_lines(tmp_path)) == 21
    record_fault("W&B without a key", ranks=1, happened="went on; sent later", lost=0, repeated=0)


def test_what_a_place_is_owed_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "_KEPT", 5)
    place = sinks.JsonLines(tmp_path / "nowhere" / "metrics.jsonl", 0)
    sink = sinks.Sink("metrics.jsonl", place, first_pause=0)
    for step in range(8):
        sink.write(sinks.Record(step, step, 0.0, {}))
    sink.close()
    assert "metrics.jsonl: 8 records are lost" in caplog.text


def test_a_package_that_is_missing_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb=online needs the package wandb: pip install"):
        MetricWriter(tmp_path, LogConfig(wandb="online"), resumed_step=0, run_config={})
