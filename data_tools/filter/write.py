"""Copy the samples of a shard that stay: the same members and bytes, in the same order."""

import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.shared.reading import read_rows
from data_tools.shared.writing import exact_key, with_fact
from siglip_train.data.packing.shards import add_member
from siglip_train.data.shards.reader import indexed_tar, short_name
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
                members = with_fact(members, WEIGHT_FIELD, round(float(task.weights[place]), 6))
            key = exact_key(index, int(task.rows[place]))
            for extension, content in members.items():
                add_member(archive, f"{key}.{extension}", content)
    return 1
