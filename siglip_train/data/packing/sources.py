"""What a source is, seen from its name or content, and which reader makes records of it."""

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from siglip_train.data.packing.coco import coco_records, is_coco
from siglip_train.data.packing.folder import folder_records, is_image_file
from siglip_train.data.packing.records import IMAGE, Found, Part, Record, SourceOptions
from siglip_train.data.packing.tables import checked_row, parquet_records, row_records, table_records
from siglip_train.data.packing.tars import tar_records
from siglip_train.data.remote.locations import expand, is_remote, short_name, unsigned
from siglip_train.errors import UserError

_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
_PICKLES = (".p", ".pkl", ".pickle")
TARS = (".tar", ".tar.gz", ".tgz")
# kind of source -> options that mean something for it
_MEANINGFUL = {
    "a folder of images": ("caption_column", "caption_template"),
    "shards": ("caption_column",),
    "a table": (
        "image_root",
        "image_column",
        "caption_column",
        "label_column",
        "key_column",
        "caption_template",
        "box_column",
    ),
    "COCO annotations": ("image_root", "coco_instances"),
}
# if of so many images none is there, the folder is the wrong one
_TRIED = 100


def find_records(source: str, options: SourceOptions) -> Found:
    """The records of a folder, a table, a COCO file or shards; keys do not repeat. Raises `UserError`."""
    found = _found(source, options)
    return Found(list(_without_repeats(found.records)), found.classnames)


def _found(source: str, options: SourceOptions) -> Found:
    path = Path(source).expanduser()
    ending = path.suffix.lower()
    if path.is_file() and ending in _PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run any code when it is read, and nothing is unpickled here: RefCOCO is "
            "published as JSON and as Parquet too (data_tools/README.md)"
        )
    if parquet := _parquet_files(source):
        _refuse("a table", options)
        name = short_name(unsigned(source)) + ("/*.parquet" if path.is_dir() else "")
        found = parquet_records(parquet, name, options)
    elif path.is_file() and ending in _TABLES:
        _refuse("a table", options)
        found = table_records(path, options)
    elif path.is_file() and ending == ".json":
        found = _json_records(path, options)
    elif path.is_dir() and not any(name.name.endswith(TARS) for name in path.iterdir()):
        _refuse("a folder of images", options)
        return folder_records(path, options)
    else:
        _refuse("shards", options)
        return Found(tar_records(source), [])
    _find_some_images(found.records)
    return found


def _parquet_files(source: str) -> Sequence[str]:
    """The Parquet files that are meant: one, those of a glob, or those of a folder with nothing else to pack."""
    if is_remote(source):
        return expand(source) if _is_parquet(source) else []
    path = Path(source).expanduser()
    if path.is_dir():
        inside = [each for each in path.iterdir() if not each.name.startswith(".")]
        # img2dataset writes Parquet files of its own beside tars and folders of images
        if any(each.is_dir() or is_image_file(each.name) or each.name.endswith(TARS) for each in inside):
            return []
    else:
        inside = [path] if path.is_file() else list(map(Path, glob.glob(str(path))))
    return sorted(str(each) for each in inside if each.suffix.lower() == ".parquet")


def _is_parquet(url: str) -> bool:
    # a question mark may stand for a character, or before a signature
    return any(name.lower().endswith(".parquet") for name in (url, unsigned(url)))


def _json_records(path: Path, options: SourceOptions) -> Found:
    data = _load(path)
    if isinstance(data, list):
        _refuse("a table", options)
        return row_records(map(checked_row, data), path.name, str(path.parent), options)
    if not is_coco(data):
        raise UserError(f"{path} is neither a list of objects nor COCO's (lists images and annotations)")
    _refuse("COCO annotations", options)
    instances = _load(Path(options.coco_instances)) if options.coco_instances else None
    if instances is not None and not is_coco(instances):
        raise UserError(f"{options.coco_instances} has no lists images and annotations, as COCO's files do")
    return Found(coco_records(data, instances, Path(options.image_root or path.parent)), [])


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _refuse(kind: str, options: SourceOptions) -> None:
    for name, value in asdict(options).items():
        if value is not None and name not in _MEANINGFUL[kind]:
            raise UserError(f"--{name.replace('_', '-')} means nothing for {kind}; leave it out")


def _find_some_images(records: Iterable[Record]) -> None:
    """`UserError` where the first images are all missing, which is a wrong folder more often than a bad set."""
    parts = (record.parts.get(IMAGE) for record in records)
    paths = [part.path for part in parts if isinstance(part, Part)][:_TRIED]
    if not paths or any(Path(path).is_file() for path in paths):
        return
    if "://" in paths[0]:
        raise UserError(f"the images are URLs ({paths[0]}): fetch them first, with img2dataset for example")
    raise UserError(f"none of the first {len(paths)} images is there, the first being {paths[0]}: "
                    "say by --image-root where they are")  # fmt: skip


def _without_repeats(records: Iterable[Record]) -> Iterable[Record]:
    """Of records with one key the first; the others become faults, since a reader could not tell them apart."""
    seen: set[str] = set()
    for record in records:
        if record.key in seen and record.fault is None:
            yield replace(record, fault=("repeated key", f"another image has the key {record.key}"))
        else:
            yield record
        seen.add(record.key)
