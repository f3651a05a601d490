"""The whole of a packing run: which record goes into which shard, what is on disk already, and the record of it all."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from siglip_train.data.packing.images import ImageOptions
from siglip_train.data.packing.records import Found, Record, SourceOptions
from siglip_train.data.packing.run_record import alone_in, earlier_record, require_same
from siglip_train.data.packing.shards import ShardReport, ShardTask, Skipped, write_shard
from siglip_train.data.packing.sources import find_records
from siglip_train.data.processes import run_all
from siglip_train.data.progress import progress
from siglip_train.errors import UserError
from siglip_train.files.atomic import remove_leftovers, write_whole

# raise it whenever the same options would give other bytes
PACK_VERSION = 3
RECORD = "pack.json"
SKIPPED = "skipped.tsv"
# reports of complete shards, while others are missing
_STATE = ".pack"
SPLITS = ("train", "validation")
# of labelled samples, beside the splits
CLASSNAMES, TEMPLATES = "classnames.txt", "templates.txt"


@dataclass(frozen=True)
class PackOptions:
    """What decides the bytes, beside the source.

    shard_samples: records a shard. validation_share: 0..1. split: a name under which all samples go, without shares.
    """

    source: SourceOptions = field(default_factory=SourceOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    shard_samples: int = 1000
    validation_share: float = 0.01
    split: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the folders of shards."""
        return (self.split,) if self.split else SPLITS

    def flat(self) -> dict[str, Any]:
        """Every option by its name on the command line."""
        own = {
            "shard_samples": self.shard_samples,
            "validation_share": self.validation_share,
            "split": self.split,
        }
        return {**asdict(self.source), **self.images._asdict(), **own}


class Packed(NamedTuple):
    """What is in a packed folder. samples, shards: of each split. skipped: by cause."""

    samples: dict[str, int]
    shards: dict[str, int]
    skipped: dict[str, int]
    is_new: bool = True


def pack(source: str, out_dir: Path, options: PackOptions, workers: int = 1) -> Packed:
    """Pack a source into `out_dir`/train and `out_dir`/validation, or go on where a run was interrupted.

    Names of classes, and templates of captions, lie beside them as `classnames.txt` and `templates.txt`.

    The bytes depend on the source and the options alone. Raises `UserError`, also where `out_dir` holds something
    else or was made with other options, and where no sample can be used, which leaves it empty.
    """
    # a folder that is not ours is refused before a long look at the source
    earlier_record(out_dir, RECORD, "pack")
    return pack_found(find_records(source, options.source), out_dir, options, workers)


def _ignore() -> None:
    pass


def pack_found(
    found: Found,
    out_dir: Path,
    options: PackOptions,
    workers: int = 1,
    moved: Callable[[], None] = _ignore,
) -> Packed:
    """`pack` of records that have been found. moved: called after every shard."""
    records = found.records
    record = {
        "generator": "pack",
        "version": PACK_VERSION,
        **options.flat(),
        "records": len(records),
        "source_fingerprint": fingerprint(records),
        "classes": len(found.classnames),
    }
    with alone_in(out_dir):
        result = _begin(out_dir, record, options.splits)
        if result is not None:
            return result
        tasks = plan_shards(records, out_dir, options)
        left = [task for task in tasks if not task.report.exists()]
        with progress(sum(len(task.records) for task in left), "packing", "packed") as advance:
            for count in run_all(write_shard, left, workers):
                advance(count)
                moved()
        _write_classes(out_dir, found, options.source)
        return _finish(out_dir, record, tasks, options.splits)


def plan_shards(records: Sequence[Record], out_dir: Path, options: PackOptions) -> list[ShardTask]:
    """Cut the records of each split into shards, in their order."""
    splits: dict[str, list[Record]] = {name: [] for name in options.splits}
    for record in records:
        splits[options.split or split_of(record, options.validation_share)].append(record)
    return [
        ShardTask(
            path=out_dir / name / f"{number:05d}.tar",
            report=out_dir / _STATE / f"{name}-{number:05d}.json",
            records=members[start : start + options.shard_samples],
            images=options.images,
            caption_column=options.source.caption_column,
        )
        for name, members in splits.items()
        for number, start in enumerate(range(0, len(members), options.shard_samples))
    ]


def split_of(record: Record, validation_share: float) -> str:
    """train or validation, by a hash of the group or key alone: it stays when other records come or go."""
    digest = hashlib.sha256(_bytes(record.group or record.key)).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") < validation_share * 2**64]


def fingerprint(records: Sequence[Record]) -> str:
    """A hash of what is known of the source before an image is opened: names, texts, and sizes in bytes."""
    digest = hashlib.sha256()
    for record in records:
        sizes = {kind: part.size for kind, part in record.parts.items()}
        known = [record.key, record.origin, sizes, record.text, record.facts, record.label, record.fault]
        digest.update(_bytes(json.dumps(known, default=str)))
    return digest.hexdigest()[:32]


def _bytes(text: str) -> bytes:
    # names of files need not be UTF-8
    return text.encode("utf-8", "backslashreplace")


def _begin(out_dir: Path, record: dict[str, Any], splits: Sequence[str]) -> Packed | None:
    """Make the folders, without leftovers; what was packed, where an earlier run is complete. Raises `UserError`."""
    present = earlier_record(out_dir, RECORD, "pack")
    if present is None:
        _save(out_dir / RECORD, record)
    else:
        require_same(out_dir, present, record, "packed")
        if "samples" in present:
            # the earlier run may have ended just before it could
            shutil.rmtree(out_dir / _STATE, ignore_errors=True)
            return Packed(present["samples"], present["shards"], present["skipped"], is_new=False)
    for folder in (out_dir, *(out_dir / name for name in (*splits, _STATE))):
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
    return None


def _write_classes(out_dir: Path, found: Found, options: SourceOptions) -> None:
    for name, lines in ((CLASSNAMES, found.classnames), (TEMPLATES, options.caption_template)):
        if lines:
            write_whole(out_dir / name, "".join(f"{' '.join(line.split())}\n" for line in lines))


def _finish(
    out_dir: Path, record: dict[str, Any], tasks: Sequence[ShardTask], splits: Sequence[str]
) -> Packed:
    reports = [(task.path.parent.name, ShardReport.load(task.report)) for task in tasks]
    skipped = [each for _, report in reports for each in report.skipped]
    causes = dict(Counter(each.cause for each in skipped).most_common())
    samples, shards = Counter(dict.fromkeys(splits, 0)), Counter(dict.fromkeys(splits, 0))
    for name, report in reports:
        samples[name] += report.samples
        shards[name] += report.samples > 0
    if samples.total():
        _save_skipped(out_dir / SKIPPED, skipped)
        _save(out_dir / RECORD, {**record, "samples": samples, "shards": shards, "skipped": causes})
    shutil.rmtree(out_dir / _STATE)
    for name in splits:
        if not shards[name]:
            (out_dir / name).rmdir()
    if not samples.total():
        # it would be in the way of the corrected command
        for name in (RECORD, CLASSNAMES, TEMPLATES):
            (out_dir / name).unlink(missing_ok=True)
        raise UserError(f"nothing could be packed: {_first_of(skipped)}")
    return Packed(dict(samples), dict(shards), causes)


def _first_of(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return "there are no samples"
    causes = Counter(each.cause for each in skipped).most_common()
    counted = ", ".join(f"{count} {cause}" for cause, count in causes)
    first = skipped[0]
    detail = f" ({' '.join(first.detail.split())})" if first.detail else ""
    return f"skipped {len(skipped)} ({counted}), the first being {first.origin}: {first.cause}{detail}"


def _save(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _save_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    lines = [
        "\t".join(Skipped._fields),
        *("\t".join(" ".join(cell.split()) for cell in each) for each in skipped),
    ]
    write_whole(path, _bytes("".join(f"{line}\n" for line in lines)).decode())
