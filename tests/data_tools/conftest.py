"""One small data set for all tests of this folder, and its samples read with plain tarfile."""

import json
import logging
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from data_tools.make_tiny.command import TinyOptions, make_tiny

OPTIONS = TinyOptions(samples=400, validation_samples=60, samples_per_class=1, referring_samples=12)
SPLITS = ("train", "validation", "classes_seen", "classes_unseen", "referring_seen", "referring_unseen")


class Sample(NamedTuple):
    key: str
    members: dict[str, bytes]

    @property
    def facts(self) -> dict:
        return json.loads(self.members["json"])


def read_split(folder: Path) -> list[Sample]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for entry in archive:
                key, extension = entry.name.split(".", 1)
                source = archive.extractfile(entry)
                assert source is not None
                samples.setdefault(key, {})[extension] = source.read()
    return [Sample(key, members) for key, members in samples.items()]


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    make_tiny(folder, OPTIONS, workers=1)
    return folder


@pytest.fixture(scope="session")
def splits(tiny_dir) -> dict[str, list[Sample]]:
    return {split: read_split(tiny_dir / split) for split in SPLITS}


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What packing says of a source, in its `text`."""
    caplog.set_level(logging.INFO, "siglip_train.data.packing")
    return caplog
