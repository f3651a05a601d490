"""Computes the output of a locked image tower for every training image once, and keeps it on disk for all epochs.

Locked-image tuning (Zhai et al. 2022, arXiv 2111.07991) may then spend its time on texts alone.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from siglip_train.data.config import DataConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.inputs.embeddings import (
    EmbeddingInput,
    Missing,
    UnembeddedImages,
    absent,
    keep,
    missing,
)
from siglip_train.data.loader import Loader
from siglip_train.distributed.collectives import any_rank, broadcast_object, gather_rows, sum_over_ranks
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder
from siglip_train.evals.loader import EvaluationLoader, build_image_loader
from siglip_train.models.adapters import is_unmerged
from siglip_train.models.vision import VisionTower

log = logging.getLogger(__name__)

# enters the name of a folder: raise it when what is kept changes
_VERSION = 1
# between lines of progress
_SECONDS = 30.0


def folder_of(
    tower: VisionTower, config: DataConfig, transform: ImageTransform, precision: str
) -> Path | None:
    """Where the embeddings by this very tower lie, None = images are to be read.  # all ranks

    Call it when the optimizer's rules have frozen what they freeze. Raises `UserError` for a tower that is not locked.
    """
    if config.embedding_dir is None:
        return None
    names = [name for name, _ in tower.named_parameters()]
    if any(map(is_unmerged, names)):
        raise UserError(
            "data.embedding_dir: adapters change what the image tower makes of an image; keep them to the text tower,"
            " adapters.pattern='text\\.encoder\\..*\\.(query|key|value|out)$', or set data.embedding_dir=null"
        )
    trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    if trained:
        raise UserError(
            f"data.embedding_dir: {len(trained)} of {len(names)} parameters of the image tower are trained, such as"
            f" vision.{trained[0]}, which changes what it makes of an image; freeze them all,"
            " optim.rules=[{pattern: '^model\\.vision\\.', frozen: true}], or set data.embedding_dir=null"
        )
    about = (_VERSION, tower.config, transform.resize, config.max_image_pixels, precision)
    # the weights of rank 0, which all ranks are about to get
    name = broadcast_object(_digest(tower, repr(about)))
    return Path(config.embedding_dir).expanduser() / name


def _digest(tower: VisionTower, about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:32]


def embed_images(training: Loader, encoder: Encoder, folder: Path) -> None:
    """Make the files that are not in `folder`, shard after shard, and let a loader read them.  # all ranks

    A shard that is done stays done, whatever ends this: what `encoder.on_batch` raises, or a `UserError`, also for
    images that cannot be read at the time.
    """
    shards = [
        Missing(made.reader, number, file)
        for source in training.sources
        for made in source.inputs
        if isinstance(made, EmbeddingInput)
        for number, file in enumerate(made.files)
    ]
    wanted = missing(shards, folder)
    log.info(
        "image embeddings: %d of %d shards are still to be embedded, in %s", len(wanted), len(shards), folder
    )
    if wanted:
        loader = build_image_loader(
            UnembeddedImages(wanted),
            encoder.transform,
            max_pixels=training.config.max_image_pixels,
            batch_size=encoder.batch_size,
            rank=encoder.world.rank,
            world_size=encoder.world.world_size,
            workers=encoder.workers,
        )
        batches = _with_progress(_rows_in_order(encoder, loader), loader.samples)
        for shard, rows in _by_shard(batches, wanted):
            _check_read(loader)
            _keep(rows, shard.file, is_main=encoder.world.is_main)
    if any_rank(bool(absent(shards, folder))):
        raise UserError(
            f"data.embedding_dir: not every rank finds the files of {folder}: give a folder that all of them share"
        )


def _rows_in_order(encoder: Encoder, loader: EvaluationLoader) -> Iterator[NDArray[np.float16]]:
    """The rows of consecutive images, `[ranks * B, D]`, NaN where there is none; the same on all ranks."""
    for batch, pooled in encoder.encoded(loader, encoder.pool_images):
        is_filler = (batch.index < 0).to(pooled.device)
        rows = pooled.half()
        if any_rank(not bool(rows[~is_filler].isfinite().all())):
            raise UserError(
                "data.embedding_dir: the image tower gives numbers that are not finite or beyond 65504, the range of"
                " float16: its weights are damaged, or set data.embedding_dir=null"
            )
        rows[is_filler] = torch.nan
        yield gather_rows(rows).cpu().numpy()


def _with_progress(batches: Iterable[NDArray], total: int) -> Iterator[NDArray]:
    begin = said = time.monotonic()
    done = 0
    for rows in batches:
        yield rows
        done, now = min(done + len(rows), total), time.monotonic()
        if done == total or now - said >= _SECONDS:
            rate = done / (now - begin)
            log.info(
                "embedded %d of %d images, %.0f/s, %.0f s left", done, total, rate, (total - done) / rate
            )
            said = now


def _by_shard(batches: Iterable[NDArray], shards: Sequence[Missing]) -> Iterator[tuple[Missing, NDArray]]:
    """Each shard with its rows, as soon as they are all there."""
    left = deque(shards)
    parts: list[NDArray] = []
    held = 0
    for rows in batches:
        parts.append(rows)
        held += len(rows)
        while left and held >= left[0].samples:
            shard, joined = left.popleft(), np.concatenate(parts)
            yield shard, joined[: shard.samples]
            parts = [joined[shard.samples :]]
            held -= shard.samples


def _check_read(loader: EvaluationLoader) -> None:
    """Raise `UserError` if images were not read that may be readable another time: they would stay bad for ever."""
    count = int(sum_over_ranks(loader.counts).get("bad/shard unavailable", 0))
    if count:
        raise UserError(
            f"data.embedding_dir: {count} images could not be read, which the log names; the shards before them are"
            " embedded: start the run again when they are back"
        )


def _keep(rows: NDArray[np.float16], file: Path, *, is_main: bool) -> None:
    failure = ""
    if is_main:
        try:
            keep(rows, file)
        except OSError as error:
            failure = f"data.embedding_dir: cannot write {file}: {error.strerror}"
    failure = broadcast_object(failure)
    if failure:
        raise UserError(failure)
