"""A process that reads batches without end and saves after each where it is, until it is killed.

python -m tests.data.killed_run ARGUMENTS.json, a file with the arguments of `read`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import DataConfig, SourceConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.loader import Loader
from siglip_train.data.pipeline import build_loader
from siglip_train.data.tokenizer import load_tokenizer
from tests.data.run_inputs import inputs_of

SIZE = 8


def loader_of(
    shards: list[str], tokenizer: str, cache: str, *, workers: int, state: dict[str, Any] | None = None,
    rank: int = 0, ranks: int = 1
) -> Loader:  # fmt: skip
    """The loader of one rank, of two sources."""
    sources = {
        "often": SourceConfig(shards[0], weight=3, language="xx"),
        "seldom": SourceConfig(shards[1], weight=1, language="json:number"),
    }
    config = DataConfig(sources, workers=workers, shuffle_window=16, cache_dir=cache, prefetch=2)
    return build_loader(
        config,
        inputs=inputs_of(config, ImageTransform(16, 8), load_tokenizer(tokenizer, context_length=8)),
        share=RankShare(SIZE, rank, ranks),
        seed=5,
        state=state,
    )


def read(shards: list[str], tokenizer: str, cache: str, *, workers: int, out: str,
         state: dict[str, Any] | None, keys: list[str]) -> None:  # fmt: skip
    """Read on from a state after these keys; `out` always holds a whole state and all keys up to it."""
    loader = loader_of(shards, tokenizer, cache, workers=workers, state=state)
    for batch in loader:
        keys += batch.keys
        Path(out + ".tmp").write_text(json.dumps({"state": loader.state(), "keys": keys}))
        os.replace(out + ".tmp", out)


if __name__ == "__main__":
    read(**json.loads(Path(sys.argv[1]).read_text()))
