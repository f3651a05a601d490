"""Write one shard of planned records; a pure function of them, so any process may write any shard, and again."""

import io
import json
import math
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from siglip_train.data.packing.coco import relative_box
from siglip_train.data.packing.coco_masks import Drawing
from siglip_train.data.packing.columns import value_at
from siglip_train.data.packing.images import ImageOptions, prepare, prepare_mask
from siglip_train.data.packing.records import CAPTION_FIELDS, IMAGE, MASK, Record, captions_of
from siglip_train.data.shards.faults import plain_detail
from siglip_train.data.shards.fields import read_facts, read_text
from siglip_train.errors import SampleError
from siglip_train.files.atomic import appearing, write_whole


class Skipped(NamedTuple):
    """A record that is not packed: its key, the image as the source names it, and why."""

    key: str
    origin: str
    cause: str
    detail: str


class ShardReport(NamedTuple):
    """What became of the records of a shard."""

    samples: int
    skipped: list[Skipped]

    def save(self, path: Path) -> None:
        """Write it; that it is there means that the shard is complete."""
        write_whole(path, json.dumps(self._asdict()))

    @classmethod
    def load(cls, path: Path) -> "ShardReport":
        """Read what `save` wrote."""
        content = json.loads(path.read_text())
        return cls(content["samples"], [Skipped(*each) for each in content["skipped"]])


class ShardTask(NamedTuple):
    """Records to be written to the tar `path`, after which `report` is written.

    caption_column: the json field to take the caption from, None = the txt member, else the usual fields.
    """

    path: Path
    report: Path
    records: Sequence[Record]
    images: ImageOptions
    caption_column: str | None = None


def write_shard(task: ShardTask) -> int:
    """Write one shard and its report; return the number of records. Where no record is usable there is no shard."""
    with appearing(task.path) as partial:
        report = _write(task, partial)
        if not report.samples:
            partial.unlink()
    report.save(task.report)
    return len(task.records)


def _write(task: ShardTask, partial: Path) -> ShardReport:
    skipped = []
    # GNU: long and non-ASCII names without a header of their own for every member
    with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive, warnings.catch_warnings():
        # Pillow warns of half the pixels that it allows
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for record in task.records:
            try:
                members = sample_members(record, task.images, task.caption_column)
            except SampleError as error:
                skipped.append(Skipped(record.key, record.origin, error.cause, plain_detail(error.detail)))
                continue
            for extension, content in members.items():
                add_member(archive, f"{record.key}.{extension}", content)
    return ShardReport(len(task.records) - len(skipped), skipped)


def sample_members(
    record: Record, images: ImageOptions, caption_column: str | None = None
) -> dict[str, bytes]:
    """Extension -> content of a sample. Raises `SampleError` where it cannot be used."""
    if record.fault is not None:
        raise SampleError(*record.fault)
    image = prepare(record.parts[IMAGE].read(), images)
    text, facts = _text_and_facts(record, caption_column)
    if not text and record.caption_needed:
        raise SampleError("empty caption", "")
    if record.box is not None:
        # in pixels of the image as it was
        box = relative_box(record.box, *image.size_before)
        facts["regions"] = [{"box": box, "text": each} for each in facts.get("captions") or [text]]
    facts.update(width=image.size[0], height=image.size[1])
    members = {image.extension: image.data}
    if text:
        members["txt"] = _utf8(text)
    members["json"] = _json_text(facts)
    if record.label is not None:
        members["cls"] = str(record.label).encode()
    for extension, part in _others(record.parts):
        content = part.read()
        if extension == MASK:
            content = prepare_mask(content, image, is_scaled=isinstance(part, Drawing))
        members[extension] = content
    return members


def _text_and_facts(record: Record, caption_column: str | None) -> tuple[str, dict[str, Any]]:
    facts, text = dict(record.facts), record.text
    if "json" in record.parts:
        facts = {**read_facts({"json": record.parts["json"].read()}), **facts}
    if "txt" in record.parts and caption_column is None:
        text = read_text(record.parts["txt"].read())
    if text or "json" not in record.parts:
        return text, facts
    fault = None
    for name in CAPTION_FIELDS if caption_column is None else (caption_column,):
        try:
            text, captions = captions_of(value_at(facts, name), facts.get("language"))
        except SampleError as error:
            fault = fault or SampleError(error.cause, f"{name}: {error.detail}")
            continue
        if text:
            return text, {**facts, **captions}
    if fault is not None and record.caption_needed:
        raise fault
    return "", facts


def _others(parts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((extension, parts[extension]) for extension in sorted(parts.keys() - {IMAGE, "txt", "json"}))


def _utf8(text: str) -> bytes:
    # half a surrogate pair, which JSON can spell, has no bytes
    return text.encode("utf-8", "replace")


def _json_text(facts: dict[str, Any]) -> bytes:
    try:
        return _utf8(json.dumps(_finite(facts), ensure_ascii=False, allow_nan=False, default=str))
    except (ValueError, RecursionError) as error:
        raise SampleError("broken json", str(error)) from error


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinities: Python's json writes them, and others' refuse the whole object."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file, without anything that differs between two runs."""
    # TarInfo's defaults (no owner, time 0) are what makes two runs equal byte for byte
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
