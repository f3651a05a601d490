"""A source of training that lies unpacked, in a folder or a table: rank 0 packs it into the cache, once a content.

The shards get the name of what they were made of (names, sizes, times of change and texts), so that a run after an edit
packs anew, and every other run takes what is there.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from siglip_train.data.packing.plan import RECORD, SKIPPED, Packed, PackOptions, fingerprint, pack_found
from siglip_train.data.packing.records import Found, Part, Record, SourceOptions
from siglip_train.data.packing.run_record import BusyError, earlier_record
from siglip_train.data.packing.sources import TARS, find_records
from siglip_train.data.remote.locations import cache_folder, is_remote
from siglip_train.data.shards.faults import too_many
from siglip_train.distributed.collectives import gather_objects, on_main_in_parts
from siglip_train.errors import UserError, said

_LOG = logging.getLogger(__name__)

_SPLIT = "shards"
_OPTIONS = PackOptions(split=_SPLIT)
# classes that the log names
_NAMED = 5
_POLL_SECONDS = 1.0
# what the keys of rows of one image have in common, as `select.by` takes it
_ONE_IMAGE = r"(.*)-\d+"

Moved = Callable[[], None]


class InCache(NamedTuple):
    """Where the shards are, the classes in label order ([] = it has none), and the part of a key that is one image."""

    shards: str
    classnames: list[str]
    by: str | None


@dataclass(frozen=True)
class PackIntoCache:
    """What is packed, and where to. source: its name in messages. max_bad_share: of images that cannot be used."""

    folder: str
    source: str
    cache_dir: str | None
    workers: int
    max_bad_share: float

    def __call__(self, moved: Moved) -> InCache:
        """The shards, which are packed where they are not; `moved` is called as it goes on.  # all ranks

        Raises `UserError` on every rank alike, also where one does not see what rank 0 has packed.
        """
        packed = on_main_in_parts(self._packed, moved)
        blind = [rank for rank, sees in enumerate(gather_objects(Path(packed.shards).is_dir())) if not sees]
        if blind:
            raise UserError(
                f"{self._key}: rank {blind[0]} does not see {packed.shards}, which rank 0 has packed: give a folder "
                "that all machines share as data.cache_dir"
            )
        return packed

    @property
    def _key(self) -> str:
        return f"data.sources.{self.source}.folder"

    def _packed(self, moved: Moved) -> InCache:
        try:
            self._check_place()
            found, by = _with_keys_of_images(find_records(self.folder, SourceOptions()))
            place = cache_folder(self.cache_dir) / "packed" / _identity(found.records)
            packed = _pack(found, place, self.workers, moved)
            self._tell(found, packed, place)
        except UserError as error:
            # options that it names are those of the command
            more = "; siglip-data pack takes options, and data.sources.NAME.shards what it makes"
            raise UserError(f"{self._key}: {error}{more if ' --' in str(error) else ''}") from error
        except OSError as error:
            raise UserError(f"{self._key}: {said(error)}; the same command goes on from there") from error
        return InCache(str(place / _SPLIT), found.classnames, by)

    def _check_place(self) -> None:
        path = Path(self.folder).expanduser()
        if is_remote(self.folder) or not path.exists():
            raise UserError(
                f"there is no {self.folder}; give a folder of images, in a folder for each class or with captions "
                "beside them, or a table of paths and captions or labels (.csv, .tsv, .jsonl, .parquet)"
            )
        names = [path.name] if path.is_file() else [each.name for each in path.iterdir()]
        if any(name.endswith(TARS) for name in names):
            raise UserError(f"{self.folder} holds shards: data.sources.{self.source}.shards={self.folder}")

    def _tell(self, found: Found, packed: Packed, place: Path) -> None:
        samples, skipped = sum(packed.samples.values()), sum(packed.skipped.values())
        names = ", ".join(found.classnames[:_NAMED]) + ", …" * (len(found.classnames) > _NAMED)
        classes = f" of {len(found.classnames)} classes ({names})" if names else ""
        how = "packed into" if packed.is_new else "as packed before in"
        _LOG.info(
            "source %s: %d images%s of %s, %s %s", self.source, samples, classes, self.folder, how, place
        )
        if not skipped:
            return
        causes = ", ".join(f"{count} {cause}" for cause, count in packed.skipped.items())
        message = (
            f"{skipped} of {samples + skipped} images cannot be used ({causes}), listed in {place / SKIPPED}"
        )
        if too_many(skipped, samples + skipped, self.max_bad_share):
            raise UserError(f"{message}; mend them, or raise data.max_bad_share ({self.max_bad_share})")
        _LOG.warning("source %s: %s", self.source, message)


def _pack(found: Found, place: Path, workers: int, moved: Moved) -> Packed:
    """Pack, after another run that does; what is there of the same name is of the same content."""
    _remove_if_torn(place)
    if not (place / RECORD).exists():
        _check_disk(found, place)
        _LOG.info("packing %d images into %s", len(found.records), place)
    while True:
        with contextlib.suppress(BusyError):
            return pack_found(found, place, _OPTIONS, workers, moved)
        moved()
        time.sleep(_POLL_SECONDS)


def _remove_if_torn(place: Path) -> None:
    """Remove what is complete by its record, and of which a cleaner of temporary folders has taken a part."""
    record = earlier_record(place, RECORD, "pack") or {}
    expected = record.get("shards", {}).get(_SPLIT)
    if expected is not None and expected != len(list(place.glob(f"{_SPLIT}/*.tar"))):
        gone = place.with_name(f".{place.name}.{os.getpid()}")
        # alone under a name of its own: another run may be about to do the same
        with contextlib.suppress(FileNotFoundError):
            place.rename(gone)
            shutil.rmtree(gone)


def _check_disk(found: Found, place: Path) -> None:
    parts = [part for record in found.records for part in record.parts.values() if isinstance(part, Part)]
    needed = sum(max(part.size, 0) for part in parts)
    free = shutil.disk_usage(place.parent.parent).free
    if needed > free:
        raise UserError(
            f"its images take {needed / 2**30:.3g} GiB, and {place.parent.parent} has {free / 2**30:.3g}: name another "
            "folder by data.cache_dir"
        )


def _identity(records: Sequence[Record]) -> str:
    """Changes with what `fingerprint` knows, and with the time at which a file was last written."""
    digest = hashlib.sha256(f"{_OPTIONS} {fingerprint(records)}".encode())
    for path in dict.fromkeys(part.path for record in records for part in record.parts.values()):
        with contextlib.suppress(OSError, ValueError):  # ValueError: a name with a zero byte
            digest.update(f" {os.stat(path).st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _with_keys_of_images(found: Found) -> tuple[Found, str | None]:
    """Where several rows are of one image, keys that say so: a part that is held out must not hold the image too."""
    images = Counter(record.group or record.key for record in found.records)
    if len(images) == len(found.records):
        return found, None
    first: dict[str, str] = {}
    number: Counter[str] = Counter()
    records = []
    for record in found.records:
        image = record.group or record.key
        name = first.setdefault(image, record.key)
        records.append(replace(record, key=f"{name}-{number[image]}"))
        number[image] += 1
    return found._replace(records=records), _ONE_IMAGE
