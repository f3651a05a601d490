"""What a locked image tower makes of training images, on disk: a folder for each tower, in it a file for each shard.

A file is `[n, D]` float16, a row for each complete sample of the shard, NaN where the image cannot be used.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from siglip_train.data.choices import Choices
from siglip_train.data.config import SourceConfig
from siglip_train.data.inputs.base import Empty, Input, InputSetup
from siglip_train.data.inputs.images import ImageInput
from siglip_train.data.remote.failed import UnavailableShardError
from siglip_train.data.remote.locations import short_name
from siglip_train.data.shards.kept_index import identity
from siglip_train.data.shards.reader import RawSample, ShardReader, ShardSet
from siglip_train.distributed.collectives import broadcast_object, is_distributed
from siglip_train.errors import SampleError, UserError
from siglip_train.files.atomic import appearing

_LOG = logging.getLogger(__name__)

# per process; as many as there are shards in a window of small ones
_OPEN = 512


def embedding_files(shards: ShardSet, folder: Path) -> list[Path]:
    """The file of each shard, named by the content of the shard and by which of its samples are meant.  # all ranks

    Raises `UserError` where a shard is gone.
    """
    # which members are read beside does not change the rows
    meant = dataclasses.replace(shards.wanted, extra=())
    places = zip(shards.paths, shards.counts.tolist(), strict=True)
    names, failure = list[str](), ""
    try:
        names = [_name(f"{identity(path, shards.cache.folder)}\0{count}\0{meant}") for path, count in places]
    except OSError as error:
        failure = f"cannot read shard {error.filename}: {error.strerror}"
    # copies of a shard on several machines may have times of their own
    names, failure = broadcast_object((names, failure))
    if failure:
        raise UserError(failure)
    return [folder / name for name in names]


def _name(content: str) -> str:
    return f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npy"


def embedding(file: Path, sample: int) -> NDArray[np.float16] | None:
    """The row of a complete sample, `[D]`, None where its image could not be used."""
    row = np.array(_rows(file)[sample])
    return None if np.isnan(row[0]) else row


@functools.lru_cache(_OPEN)
def _rows(file: Path) -> NDArray[np.float16]:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def keep(rows: NDArray[np.float16], file: Path) -> None:
    """Write the rows of a shard; they appear complete or not at all. Raises `OSError`."""
    with appearing(file) as partial, partial.open("wb") as stream:
        np.save(stream, rows, allow_pickle=False)


class EmbeddingInput(Input):
    """`[B, D]` float16: what the locked image tower has made of the images, in their place; not normalised.

    files: of each shard.
    """

    part = "pooled"

    def __init__(self, setup: InputSetup) -> None:
        assert setup.run.embedding_dir is not None, "stands_in puts it in only where there is one"
        self.reader = setup.reader
        self.files = embedding_files(setup.reader.shards, setup.run.embedding_dir)
        self._images = ImageInput(setup)

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        """None: the image, the largest part of a sample, is not read."""
        return ()

    def make(self, sample: RawSample, choices: Choices) -> NDArray[np.float16]:
        """`[D]`."""
        shard, number = sample.place
        row = embedding(self.files[shard], number)
        if row is not None:
            return row
        # what was wrong with the image then is wrong now, and has its own name
        self._images.make(self.reader.read(shard, number), choices)
        raise SampleError("no embedding", f"the image could not be read before; remove {self.files[shard]}")

    def collate(self, rows: list[Any], empty: Empty) -> Tensor:
        """Stack them."""
        return torch.from_numpy(np.stack(rows))


def stands_in(kinds: Iterable[type[Input]]) -> tuple[type[Input], ...]:
    """The inputs of a run that reads embeddings where it would read images."""
    return tuple(EmbeddingInput if kind is ImageInput else kind for kind in kinds)


class Missing(NamedTuple):
    """A shard whose file is to be made."""

    reader: ShardReader
    shard: int
    file: Path

    @property
    def samples(self) -> int:
        """Rows of the file."""
        return int(self.reader.shards.counts[self.shard])


def missing(shards: Sequence[Missing], folder: Path) -> list[Missing]:
    """Those of `shards` whose file is not in the folder, which is made, or is damaged; each file once.  # all ranks

    Raises `UserError` where the folder cannot be made.
    """
    # sources of one set of shards share their files
    by_file = {shard.file: shard for shard in shards}
    files, failure = list[Path](), ""
    # one rank looks, for all to agree; and some network filesystems remember for a while what they did not find
    if not is_distributed() or dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = absent(by_file.values(), folder)
            damaged = sorted(file for file in by_file.keys() - set(files) if _is_damaged(by_file[file]))
            if damaged:
                _LOG.warning(
                    "image embeddings: %d files in %s are damaged, such as %s, and are made again",
                    len(damaged), folder, damaged[0].name,
                )  # fmt: skip
            files += damaged
        except OSError as error:
            failure = f"data.embedding_dir: cannot make {folder}: {error.strerror}"
    files, failure = broadcast_object((files, failure))
    if failure:
        raise UserError(failure)
    return [by_file[file] for file in files]


def _is_damaged(shard: Missing) -> bool:
    """Whether a file holds other than the rows of its shard: a copy was interrupted, or a disk was full."""
    if not shard.samples:
        return False
    try:
        rows = np.load(shard.file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return True
    return rows.ndim != 2 or len(rows) != shard.samples or rows.dtype != np.float16


def absent(shards: Iterable[Missing], folder: Path) -> list[Path]:
    """The files that this rank does not find in the folder; a shard without samples needs none."""
    there = set[str]()
    with contextlib.suppress(OSError):
        there = set(os.listdir(folder))
    return [shard.file for shard in shards if shard.samples and shard.file.name not in there]


class UnembeddedImages:
    """The samples of some shards, one shard after the other, by place, as the evaluation loader asks for them."""

    def __init__(self, shards: Sequence[Missing]) -> None:
        self._shards = list(shards)
        self._ends = np.cumsum([shard.samples for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, place: int) -> RawSample:
        """The sample at a place. Raises `SampleError`; `UnavailableShardError` for what may be better another time."""
        shard, sample = self._locate(place)
        try:
            return shard.reader.read(shard.shard, sample)
        except SampleError:
            raise
        except Exception as error:
            raise UnavailableShardError(f"{type(error).__name__}: {error}") from error

    def name(self, place: int) -> tuple[str, str]:
        """(shard, "?"), for messages."""
        shard, _ = self._locate(place)
        return short_name(shard.reader.shards.urls[shard.shard]), "?"

    def _locate(self, place: int) -> tuple[Missing, int]:
        number = int(np.searchsorted(self._ends, place, side="right"))
        return self._shards[number], place - int(self._ends[number]) + self._shards[number].samples
