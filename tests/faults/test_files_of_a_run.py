"""Files that a run writes: valid for every reader, complete or not there, whatever the numbers or the disk do."""

import json
import os
from pathlib import Path

import pytest

from siglip_train.files.atomic import appearing, put_folder, write_text
from siglip_train.metrics import LogConfig, MetricWriter


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path, value: float, record_fault) -> None:
    writer = MetricWriter(tmp_path, LogConfig(), resumed_step=0, run_config={})
    writer.write(1, 10, {"train/logit_scale": value, "train/loss": 2.0})
    writer.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=_refuse)
    assert record["train/logit_scale"] is None
    assert record["not_finite"] == {"train/logit_scale": str(value)}
    assert record["train/loss"] == 2.0
    record_fault(
        f"a metric is {value}", ranks=1, happened="null, and its name in not_finite", lost=0, repeated=0
    )


def test_what_is_renamed_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure a name must not stand over content that was in memory alone."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_text(tmp_path / "LAST", "x")
    (before, partial), *after = events
    assert before == "fsync"
    assert partial.startswith(".LAST")
    assert after == [("rename", "LAST"), ("fsync", tmp_path.name)]
    events.clear()
    (tmp_path / "aside" / "weights").mkdir(parents=True)
    (tmp_path / "aside" / "weights" / "w").write_text("1")
    put_folder(tmp_path / "aside", tmp_path / "there")
    place = events.index(("rename", "there"))
    assert {name for _, name in events[:place]} == {"aside", "weights", "w"}
    assert events[place + 1 :] == [("fsync", tmp_path.name)]


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")

    def fill_the_disk() -> None:
        with appearing(tmp_path / "file") as partial:
            partial.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill_the_disk()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
