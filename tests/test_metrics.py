"""Where numbers go: JSONL, TensorBoard, Weights & Biases offline, and the progress lines."""

import json
import logging
from pathlib import Path

import pytest
import torch

from siglip_train.metrics import LogConfig, MetricWriter, memory_gib, peak_flops
from siglip_train.progress_display import ProgressDisplay

STEP = {"train/loss": 1.5, "train/samples_per_second": 100.0, "train/data_time": 0.1, "train/step_time": 0.4}


def test_records_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "train/loss": float(step)}) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "train/l')
    writer = MetricWriter(tmp_path, LogConfig(), resumed_step=3, run_config={})
    writer.write(4, 40, {"train/loss": 0.5})
    writer.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["train/loss"] == 0.5
    assert records[-1]["samples_seen"] == 40


def test_tensorboard_and_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    pytest.importorskip("wandb", reason="wandb is not installed")
    config = LogConfig(tensorboard=True, wandb="offline")
    writer = MetricWriter(tmp_path, config, resumed_step=0, run_config={"seed": 1})
    writer.write(1, 10, {"train/loss": 2.0})
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_line_for_each_logged_step_off_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="siglip_train.progress_display")
    display = ProgressDisplay(total_steps=10, start_step=0, is_main=True, is_terminal=False)
    display.start()
    display.step(1, None)
    display.step(2, STEP)
    display.close()
    assert [record.message.split("  ETA")[0] for record in caplog.records] == [
        "step 2/10  loss 1.5000  100 samples/s  data wait 25 %"
    ]


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture) -> None:
    display = ProgressDisplay(total_steps=10, start_step=4, is_main=True, is_terminal=True)
    display.start()
    display.step(5, STEP)
    display.close()
    output = capsys.readouterr()
    assert "5/10" in output.out + output.err
    assert "loss 1.5000" in output.out + output.err


def test_there_is_no_mfu_without_a_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert memory_gib(torch.device("cpu")) > 0.05
