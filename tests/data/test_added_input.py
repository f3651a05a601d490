"""An input and an objective of one's own, each a class and nothing else, train on two ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from siglip_train.batch import Batch, join
from siglip_train.data.choices import Choices
from siglip_train.data.config import SourceConfig
from siglip_train.data.inputs.base import Empty, Input
from siglip_train.data.inputs.images import ImageInput
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import SampleError
from siglip_train.objectives.base import Objective
from siglip_train.objectives.forward_pass import ForwardPass
from tests.data.shard_files import sample, write_tar
from tests.forks import run_program


class Counts(Input):
    """float32 `[B, 1]` from the member `num`, and noise `[B, longest]` that is as long as the longest row wants it."""

    part = "counts"
    row_bytes = 4 * 400_000

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        return ("num",)

    def make(self, sample: RawSample, choices: Choices) -> int:
        if "num" not in sample.members:
            raise SampleError("no number", "num is missing")
        return int(sample.members["num"])

    def collate(self, rows: list[Any], empty: Empty) -> dict[str, Tensor]:
        noise = empty((len(rows), 300_000 + max(rows)), torch.float32)
        torch.arange(noise.shape[1], out=noise[0])
        noise[1:] = noise[:1]
        return {"number": torch.tensor(rows, dtype=torch.float32)[:, None], "noise": noise}


class Regression(Objective):
    """The squared error of a linear head on the image."""

    inputs = (Counts, ImageInput)

    def __init__(self, *, width: int, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.head = nn.Linear(width, 1)

    def forward(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        counts = forward_pass.batch.part("counts")
        expected = torch.arange(counts["noise"].shape[1], device=counts["noise"].device)
        assert (counts["noise"] == expected).all(), "memory was given to another piece while it was in use"
        return {"samples": (self.head(forward_pass.image_average) - counts["number"]).square().sum()}


def test_they_train_on_two_ranks_with_workers(tmp_path: Path) -> None:
    # one in twelve lacks what the input reads, and is replaced
    rows = [sample(f"{i:03d}", i, num=b"" if i % 12 == 5 else str(10 + i % 7).encode()) for i in range(120)]
    write_tar(tmp_path / "0.tar", [(name, data) for row in rows for name, data in row if data])
    arguments = [
        "model=tiny_cifar", "tokenizer=null", "objectives.sigmoid=null",
        "+objectives.regression._target_=tests.data.test_added_input.Regression", "+objectives.regression.width=128",
        f"data.sources.mine.shards={tmp_path / '0.tar'}", "data.max_bad_share=1", "data.workers=2",
        "global_batch_size=16", "total_samples=96", "log.every_steps=1", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    result = run_program("siglip_train.train", arguments, ranks=2)
    assert result.returncode == 0, result.stderr
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/regression_loss"] for row in logged if "train/regression_loss" in row]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert logged[-1]["data/bad/no number"] > 0
    assert logged[-1]["data/seen"] == 96


def test_a_decision_is_drawn_once_by_who_asks_first() -> None:
    choices, other = (Choices(np.random.default_rng(3)) for _ in range(2))
    crop = choices.once("crop", lambda rng: rng.random())
    assert choices.once("crop", lambda rng: rng.random()) == crop
    assert choices.once("mirror", lambda rng: rng.random()) != crop
    assert other.once("crop", lambda rng: rng.random()) == crop


def test_parts_of_any_form_are_joined_and_cut_into_rows() -> None:
    def batch(rows: range) -> Batch:
        parts = {"pair": (torch.tensor([*rows]), {"twice": 2 * torch.tensor([*rows])}), "none": None}
        return Batch(parts, tuple(map(str, rows)))

    whole = join([batch(range(3)), batch(range(3, 5))])
    assert whole.size == 5
    assert whole.keys == tuple("01234")
    again = join(whole.split(2))
    assert torch.equal(again.part("pair")[1]["twice"], torch.arange(0, 10, 2))
    assert again.part("none") is None
