"""The shards are plain WebDataset: the reference library reads what we write, sample for sample."""

from pathlib import Path

import pytest

from siglip_train.data.shards.reader import read_samples


def test_webdataset_reads_the_same_samples(tiny_data: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    shard = str(sorted((tiny_data / "train").glob("*.tar"))[0])
    theirs = list(webdataset.WebDataset(shard, shardshuffle=False))
    ours = list(read_samples(shard))
    assert len(ours) == len(theirs) > 10
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.key == other["__key__"]
        assert mine.members == {name: data for name, data in other.items() if not name.startswith("__")}
