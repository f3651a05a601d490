"""The mixes of conf/data, read from real shards: languages come as often as their weights say."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore

from siglip_train.composition import defaults_of, plain
from siglip_train.config import Config
from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import DataConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.loader import Loader
from siglip_train.data.pipeline import build_loader
from siglip_train.data.tokenizer import load_tokenizer
from siglip_train.typed import build
from tests.conftest import ROOT
from tests.data.run_inputs import inputs_of

EMOJI = ROOT.parent / "shared" / "data" / "emoji_train"


def _sources(name: str) -> dict[str, Any]:
    ConfigStore.instance().store(name="train_defaults", node=defaults_of(Config))
    with initialize_config_module("conf", version_base="1.3"):
        return plain(compose("train", overrides=[f"data={name}"]))["data"]["sources"]


def _loader(sources: dict[str, Any], tokenizer: Path, cache: str, global_batch_size: int) -> Loader:
    values = {"sources": sources, "workers": 0, "cache_dir": cache, "shuffle_window": 100}
    config = build(DataConfig, values)
    return build_loader(
        config,
        inputs=inputs_of(config, ImageTransform(16, 8), load_tokenizer(tokenizer, context_length=24)),
        share=RankShare(global_batch_size),
        seed=0,
    )


def _languages(loader: Loader) -> Counter[str]:
    return Counter(
        {
            name.removeprefix("language/"): count
            for name, count in loader.counts.items()
            if name.startswith("language/")
        }
    )


def test_nine_in_ten_captions_of_the_generated_data_are_english(tiny_data: Path, cache: str):
    sources = _sources("tiny_90_10")
    for source in sources.values():
        source["shards"] = f"{tiny_data}/train/*.tar"
    loader = _loader(sources, tiny_data / "tokenizer.model", cache, 35)
    for batches, _ in enumerate(iter(loader), start=1):
        counts = _languages(loader)
        assert counts.total() == 35 * batches
        assert abs(counts["en"] - 0.9 * 35 * batches) <= 35
        if batches % 2 == 0:
            # a block is two batches, as a rare language has half a sample in one
            others = dict.fromkeys(("de", "zh", "ar", "es", "ru", "hi", "ja"), batches // 2)
            assert counts == {"en": 63 * batches // 2, **others}
        if batches == 8:
            break


@pytest.mark.skipif(not EMOJI.is_dir(), reason="no ../shared/data/emoji_train")
def test_nine_in_ten_captions_of_the_emoji_are_english(tiny_data: Path, cache: str):
    sources = _sources("emoji_90_10")
    for source in sources.values():
        source["shards"] = str(EMOJI / "*.tar")
    loader = _loader(sources, tiny_data / "tokenizer.model", cache, 40)
    iterator = iter(loader)
    keys = [key for _ in range(10) for key in next(iterator).keys]
    counts = _languages(loader)
    assert (counts["en"], counts.total()) == (360, 400)
    assert len(counts) > 8
    # what the loader counts is what the keys end in
    assert counts == Counter(key.rsplit("_", 1)[1] for key in keys)
