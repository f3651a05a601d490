"""Records of existing shards, to pack them anew: webdataset tars of any origin, img2dataset's among them."""

from collections.abc import Iterator
from pathlib import Path

from siglip_train.data.packing.records import IMAGE, Part, Record
from siglip_train.data.remote.locations import cache_folder, expand
from siglip_train.data.shards.reader import indexed_tar, short_name
from siglip_train.data.shards.tar import TarIndex

_IMAGES = ("jpg", "jpeg", "png", "webp")


def tar_records(shards: str) -> list[Record]:
    """A record for every sample of the shards (`shards` as in data.sources), in file order.

    A key that came before gets the name of its shard in front. Raises `UserError`.
    """
    cache = cache_folder(None)
    records: list[Record] = []
    seen: set[str] = set()
    for url in expand(shards):
        path, index = indexed_tar(url, cache)
        for record in _records(index, path, short_name(url), seen):
            records.append(record)
            seen.add(record.key)
    return records


def _records(index: TarIndex, path: Path, shard: str, seen: set[str]) -> Iterator[Record]:
    for sample in range(len(index)):
        key = index.key(sample)
        parts = {
            extension: Part(str(path), int(index.offsets[member]), int(index.sizes[member]))
            for extension, member in index.members(sample).items()
        }
        image = next((extension for extension in _IMAGES if extension in parts), None)
        if image is not None:
            # a second image could be taken for the first where that is encoded anew
            others = {extension: parts[extension] for extension in parts if extension not in _IMAGES}
            parts = {IMAGE: parts[image], **others}
        yield Record(
            key=f"{shard.split('.', 1)[0]}/{key}" if key in seen else key,
            origin=f"{shard}/{key}",
            parts=parts,
            group=key,
            caption_needed="cls" not in parts,
            fault=None if image else ("no image", f"it has {', '.join(parts)}"),
        )
    for key, cause in zip(index.torn.tolist(), index.torn_causes.tolist(), strict=True):
        yield Record(f"{shard}/{key}", f"{shard}/{key}", fault=(cause, "the shard is damaged there"))
