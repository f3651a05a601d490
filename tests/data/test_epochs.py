"""What is said of a run before it begins, and how far it is through its sources."""

from pathlib import Path

import pytest

from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import DataConfig, SourceConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.loader import Loader
from siglip_train.data.mixture import StageConfig
from siglip_train.data.pipeline import build_loader
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import UserError
from tests.data.run_inputs import inputs_of
from tests.data.shard_files import write_shards


def _loader(folder: Path, tokenizer: Tokenizer, share: RankShare, state: dict | None = None) -> Loader:
    sources = {
        "many": SourceConfig(write_shards(folder / "many", [10, 10, 20]), weight=3),
        "few": SourceConfig(write_shards(folder / "few", [10]), weight=1),
        "late": SourceConfig(write_shards(folder / "late", [16]), weight=0),
    }
    stages = [StageConfig(30, {"few": 0.5, "late": 0.5})]
    config = DataConfig(sources, stages, workers=0, cache_dir=str(folder / "cache"))
    return build_loader(
        config, inputs=inputs_of(config, ImageTransform(16, 8), tokenizer), share=share, seed=0, state=state
    )


def test_the_outlook_counts_every_stage_exactly(tmp_path: Path, tokenizer: Tokenizer):
    # 32 samples of the first stage, 64 of the second
    assert _loader(tmp_path, tokenizer, RankShare(8)).outlook(90) == [
        "source many: 40 samples in 3 shards, 25 % of the mix, 0.6 epochs in this run",
        "source few: 10 samples in 1 shard, 41.7 % of the mix, 4.0 epochs in this run",
        "source late: 16 samples in 1 shard, 33.3 % of the mix, 2.0 epochs in this run",
        "from sample 30 on: many 0 %, few 50 %, late 50 %",
    ]
    assert len(_loader(tmp_path, tokenizer, RankShare(8)).outlook(24)) == 3


def test_passes_follow_from_the_position_on_every_rank_and_after_a_resume(
    tmp_path: Path, tokenizer: Tokenizer
):
    loader = _loader(tmp_path, tokenizer, RankShare(8))
    iterator = iter(loader)
    for _ in range(6):
        next(iterator)
    expected = {"passes/many": 24 / 40, "passes/few": (8 + 8) / 10, "passes/late": 8 / 16}

    def passes(counts: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in counts.items() if name.startswith("passes/")}

    assert passes(loader.total_counts()) == expected
    assert {f"passes/{name}": loader.counts[f"source/{name}"] for name in ("many", "few", "late")} == {
        "passes/many": 24, "passes/few": 16, "passes/late": 8
    }  # fmt: skip
    for rank in range(2):
        resumed = _loader(tmp_path, tokenizer, RankShare(8, rank, 2), loader.state())
        assert passes(resumed.total_counts()) == expected


def test_a_source_must_hold_what_a_batch_of_any_stage_takes(tmp_path: Path, tokenizer: Tokenizer):
    with pytest.raises(UserError, match="source few has 10 complete samples, fewer than the 12 of one"):
        _loader(tmp_path, tokenizer, RankShare(24))


def test_stages_are_part_of_the_fingerprint(tmp_path: Path, tokenizer: Tokenizer):
    source = {
        "a": SourceConfig(write_shards(tmp_path / "a", [20])),
        "b": SourceConfig(write_shards(tmp_path / "b", [20])),
    }
    prints = set()
    for stages in (
        [],
        [StageConfig(40, {"a": 1})],
        [StageConfig(48, {"a": 1})],
        [StageConfig(48, {"a": 2, "b": 1})],
    ):
        config = DataConfig(source, stages, workers=0, cache_dir=str(tmp_path / "cache"))
        prints.add(
            build_loader(
                config, inputs=inputs_of(config, ImageTransform(16, 8), tokenizer), share=RankShare(8), seed=0
            ).fingerprint
        )
    assert len(prints) == 4
