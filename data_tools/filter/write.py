"""Copy the samples of a shard that stay: the same members and bytes, in the same order."""

import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.shared.reading import read_rows
from siglip_train.data.packing.shards import add_member
from siglip_train.data.shards.fields import read_facts
from siglip_train.data.shards.reader import indexed_tar, short_name
from siglip_train.data.shards.tar import TarIndex
from siglip_train.files.atomic import appearing

WEIGHT_FIELD = "balance_weight"


class WriteTask(NamedTuple):
    """Samples `rows` of the shard `url` go to the tar `path`.

    cache: where downloads are. weights: of those samples, for their json; None = as it is.
    """

    url: str
    cache: Path
    path: Path
    rows: NDArray[np.int64]
    weights: NDArray[np.float64] | None = None


def write_shard(task: WriteTask) -> int:
    """Write one shard, complete or not at all; return 1. Raises `UserError`."""
    source, index = indexed_tar(task.url, task.cache)
    with appearing(task.path) as partial, tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive:
        samples = read_rows(source, short_name(task.url), index, task.rows.tolist(), longest=None)
        for place, sample in enumerate(samples):
            members = sample.members
            if task.weights is not None:
                members = with_weight(members, float(task.weights[place]))
            key = _exact_key(index, int(task.rows[place]))
            for extension, content in members.items():
                add_member(archive, f"{key}.{extension}", content)
    return 1


def with_weight(members: dict[str, bytes], weight: float) -> dict[str, bytes]:
    """The members with a weight in json, which is added where there is none."""
    facts = {**read_facts(members), WEIGHT_FIELD: round(weight, 6)}
    return {**members, "json": json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace")}


def _exact_key(index: TarIndex, row: int) -> str:
    """The key with every byte that it has, where it is not UTF-8 too."""
    start = int(index.key_ends[row - 1]) if row else 0
    return index.keys[start : int(index.key_ends[row])].tobytes().decode("utf-8", "surrogateescape")
