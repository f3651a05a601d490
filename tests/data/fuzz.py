"""Random damage on shards, and the check that no damage crashes a reader or gives an image the caption of another.

`python -m tests.data.fuzz --seconds 600` goes on where the tests stop.
"""

import argparse
import gzip
import io
import json
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_train.data.image_file import decode
from siglip_train.data.remote.cache import local_tar
from siglip_train.data.shards.fields import CaptionChoice, Field
from siglip_train.data.shards.reader import RawSample
from siglip_train.data.shards.scan import scan
from siglip_train.data.shards.tar import TarIndex
from siglip_train.data.shards.tar_members import BrokenTarError
from siglip_train.errors import SampleError, UserError

BLOCK = 512
SAMPLES = 8
KINDS = ("png", "jpg", "webp")
CAPTIONS = CaptionChoice({"txt": 0.5, "json:captions.*": 0.5})
LANGUAGE = Field.parse("json:language")
# all that a reader may raise
CLEAR = (BrokenTarError, UserError)


class Violation(AssertionError):
    """A reader did what it must never do."""


class Entry(NamedTuple):
    """A member of the undamaged tar: its sample, and where its first header, its own header and its bytes begin."""

    sample: int
    begin: int
    header: int
    data: int
    size: int


@dataclass(frozen=True)
class Shard:
    """An undamaged tar. records: (begin, end) of each long name and of each block of pax records."""

    name: str
    content: bytes
    entries: list[Entry]
    keys: list[str]
    records: list[tuple[int, int]]


def make_shard(name: str, key: str, tar_format: int, kinds: tuple[str, ...]) -> Shard:
    """A few samples with an image, a text and json, all of which say which sample they are of."""
    out, keys = io.BytesIO(), [key.format(number) for number in range(SAMPLES)]
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for number, each in enumerate(keys):
            for extension, data in _members(number, kinds[number % len(kinds)]):
                info = tarfile.TarInfo(f"{each}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    content = out.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = archive.getmembers()
    entries = [
        Entry(place // 3, each.offset, each.offset_data - BLOCK, each.offset_data, each.size)
        for place, each in enumerate(found)
    ]
    records = [(each.begin + BLOCK, each.header) for each in entries if each.header > each.begin]
    return Shard(name, content, entries, keys, records)


def _members(number: int, kind: str) -> Iterator[tuple[str, bytes]]:
    picture = io.BytesIO()
    levels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(levels).save(picture, {"jpg": "JPEG"}.get(kind, kind), quality=80)
    yield kind, picture.getvalue()
    yield "txt", f"the image number {number}".encode()
    yield (
        "json",
        json.dumps({"language": "en", "captions": {"de": f"Bild {number}", "zh": f"第{number}张"}}).encode(),
    )


class Damaged(NamedTuple):
    """content, and for each of its bytes the place it had in the undamaged tar, -1 = it was changed."""

    content: NDArray[np.uint8]
    origin: NDArray[np.int64]

    def joined(self, *parts: slice) -> "Damaged":
        """Only these parts, in this order."""
        return Damaged(*(np.concatenate([whole[part] for part in parts]) for whole in self))

    def written(self, at: int, data: NDArray[np.uint8]) -> "Damaged":
        """With other bytes from `at` on; what is beyond the end is left out."""
        content, origin = self.content.copy(), self.origin.copy()
        data = data[: len(content) - at]
        changed = content[at : at + len(data)] != data
        content[at : at + len(data)] = data
        origin[at : at + len(data)][changed] = -1
        return Damaged(content, origin)


Random = np.random.Generator
Mutation = Callable[[Damaged, Shard, Random], Damaged]


def _place(damaged: Damaged, shard: Shard, random: Random) -> int:
    """Anywhere, or near where it hurts: in a header, in records, in a member."""
    entry = shard.entries[random.integers(len(shard.entries))]
    records = (
        shard.records[random.integers(len(shard.records))] if shard.records else (entry.header, entry.data)
    )
    ranges = [
        (0, len(damaged.content)),
        (entry.begin, entry.data),
        records,
        (entry.data, entry.data + entry.size),
    ]
    begin, end = ranges[random.integers(len(ranges))]
    return min(int(random.integers(begin, end)), len(damaged.content) - 1)


def flips(damaged: Damaged, shard: Shard, random: Random) -> Damaged:
    """A few bits, close together or not."""
    at = _place(damaged, shard, random)
    for _ in range(random.integers(1, 6)):
        damaged = damaged.written(at, damaged.content[at : at + 1] ^ np.uint8(1 << random.integers(8)))
        at = (
            _place(damaged, shard, random) if random.random() < 0.3 else max(0, at - int(random.integers(20)))
        )
    return damaged


def flipped(damaged: Damaged, random: Random) -> NDArray[np.uint8]:
    """The bytes with one bit flipped, anywhere."""
    at = int(random.integers(len(damaged.content)))
    return damaged.written(at, damaged.content[at : at + 1] ^ np.uint8(1 << random.integers(8))).content


def _stretch(damaged: Damaged, shard: Shard, random: Random) -> slice:
    at, length = _place(damaged, shard, random), int(2 ** random.uniform(0, 13))
    if random.random() < 0.3:
        at, length = at // BLOCK * BLOCK, -(-length // BLOCK) * BLOCK
    return slice(at, min(at + length, len(damaged.content)))


def zeros(damaged: Damaged, shard: Shard, random: Random) -> Damaged:
    """A stretch was never written."""
    stretch = _stretch(damaged, shard, random)
    return damaged.written(stretch.start, np.zeros(stretch.stop - stretch.start, dtype=np.uint8))


def noise(damaged: Damaged, shard: Shard, random: Random) -> Damaged:
    """A stretch is something else."""
    stretch = _stretch(damaged, shard, random)
    return damaged.written(
        stretch.start, random.integers(0, 256, stretch.stop - stretch.start, dtype=np.uint8)
    )


def copied(damaged: Damaged, shard: Shard, random: Random) -> Damaged:
    """A part of the tar stands over another part."""
    source = _stretch(damaged, shard, random)
    to = _place(damaged, shard, random)
    return damaged.joined(slice(to), source, slice(to + source.stop - source.start, None))


def _cuts(damaged: Damaged, shard: Shard, random: Random, number: int) -> list[int]:
    """Places anywhere, between blocks, or where a member begins or ends."""
    if random.random() < 0.4:
        borders = [place for entry in shard.entries for place in (entry.begin, entry.header, entry.data)]
        return sorted(random.choice(borders, number).tolist())
    step = BLOCK if random.random() < 0.5 else 1
    return sorted(_place(damaged, shard, random) // step * step for _ in range(number))


def truncated(damaged: Damaged, shard: Shard, random: Random) -> Damaged:
    """The end is missing."""
    return damaged.joined(slice(_cuts(damaged, shard, random, 1)[0]))


def removed(damaged: Damaged, shard: Shard, random: Random) -> Damaged:
    """Something is missing in between."""
    begin, end = _cuts(damaged, shard, random, 2)
    return damaged.joined(slice(begin), slice(end, None))


def duplicated(damaged: Damaged, shard: Shard, random: Random) -> Damaged:
    """A part stands again elsewhere."""
    begin, end, to = random.permuted(_cuts(damaged, shard, random, 3)).tolist()
    return damaged.joined(slice(to), slice(min(begin, end), max(begin, end)), slice(to, None))


def size_of_a_member(damaged: Damaged, shard: Shard, random: Random) -> Damaged:
    """A header with a right checksum and a wrong size, small, absurd or negative.

    Of that member nothing can be said, so that its bytes count as changed.
    """
    entry = shard.entries[random.integers(len(shard.entries))]
    header = entry.header
    block = damaged.content[header : header + BLOCK].tobytes()
    if len(block) < BLOCK:
        return damaged
    exponent = random.integers(0, 33)
    size = int(random.integers(2**exponent)) if random.random() < 0.8 else 10**12
    field = (
        b"-%010o\0" % (size % 8**10) if random.random() < 0.2 else tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    )
    block = block[:124] + field + block[136:148] + b" " * 8 + block[156:]
    block = block[:148] + b"%06o\0 " % sum(block) + block[156:]
    damaged = damaged.written(header, np.frombuffer(block, dtype=np.uint8))
    damaged.origin[entry.data : entry.data + entry.size] = -1
    return damaged


def name_of_a_neighbour(damaged: Damaged, shard: Shard, random: Random) -> Damaged:
    """A member's name becomes that of another sample or kind; of long names and pax records no checksum tells."""
    place = int(random.integers(len(shard.entries)))
    entry = shard.entries[place]
    begin, end = shard.records[place] if shard.records else (entry.header, entry.header + 100)
    text = damaged.content[begin:end].tobytes()
    own, other = entry.sample, entry.sample + int(random.choice([-1, 1]))
    pairs = [(b"%d." % own, b"%d." % other)] * 3
    pairs += [
        (b".txt", b".jpg"),
        (b".json", b".jpeg"),
        (b".png", b".txt"),
        (b"path=", b"size="),
        (b"path=", b"paTh="),
    ]
    old, new = pairs[random.integers(len(pairs))]
    return damaged.written(begin, np.frombuffer(text.replace(old, new), dtype=np.uint8))


MUTATIONS: dict[str, Mutation] = {
    "flips": flips,
    "zeros": zeros,
    "noise": noise,
    "copied": copied,
    "truncated": truncated,
    "removed": removed,
    "duplicated": duplicated,
    "size": size_of_a_member,
    "name": name_of_a_neighbour,
}


def intact(entry: Entry, damaged: Damaged, offset: int) -> bool:
    """Does this member, with the headers before it, stand in one piece, its own bytes unchanged?"""
    begin = offset - (entry.data - entry.begin)
    span = damaged.origin[max(begin, 0) : offset + entry.size]
    own = damaged.origin[offset : offset + entry.size]
    shift = span - np.arange(len(span)) - entry.begin
    return begin >= 0 and len(own) == entry.size and not (shift[span >= 0]).any() and bool((own >= 0).all())


def check_members(shard: Shard, damaged: Damaged, index: TarIndex) -> None:
    """In no sample the bytes of two, and in none bytes that are no member's, unless the damage is in those bytes."""
    by_data = {entry.data: entry for entry in shard.entries}
    for sample in range(len(index)):
        sources = set()
        for extension, member in index.members(sample).items():
            offset, size = int(index.offsets[member]), int(index.sizes[member])
            origin = int(damaged.origin[offset]) if offset < len(damaged.origin) else -1
            entry = by_data.get(origin)
            if entry is None or not intact(entry, damaged, offset):
                continue
            if entry.size != size:
                raise Violation(f"{index.key(sample)}.{extension} has {size} bytes of {entry.size}")
            sources.add(entry.sample)
        if len(sources) > 1:
            raise Violation(f"{index.key(sample)} has members of samples {sorted(sources)}")


def check_samples(content: bytes, index: TarIndex, original: set[bytes], random: Random) -> Counter[str]:
    """Decode what has changed: a clear error, or an image and a caption."""
    causes: Counter[str] = Counter()
    for sample in range(len(index)):
        members = {
            extension: content[index.offsets[member] : index.offsets[member] + index.sizes[member]]
            for extension, member in index.members(sample).items()
        }
        if original.issuperset(members.values()):
            continue
        for part in (_picture, _caption):
            try:
                part(RawSample("shard", index.key(sample), members), random)
            except SampleError as error:
                causes[error.cause] += 1
    return causes


def _picture(sample: RawSample, random: Random) -> None:
    data = next((sample.members[kind] for kind in KINDS if kind in sample.members), None)
    if data is not None:
        decode(data, 1 << 24)


def _caption(sample: RawSample, random: Random) -> None:
    CAPTIONS.draw(sample, random).encode()
    str(LANGUAGE.first(sample)).encode("utf-8", "replace")


class Fuzz:
    """Damages shards and reads them, case by case; the same for the same seed."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        # one file that is written again and again: to make a new one takes longer than to read it
        self.path = folder / "damaged.tar"
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT)
        long = "folder/" + "k" * 110
        self.shards = [
            make_shard("ustar", "{:05d}", tarfile.USTAR_FORMAT, KINDS),
            # NOTE: one kind, since a long name has no checksum: where b.png becomes a.png, and a has a.webp, a has two
            # images, as a sample may have
            make_shard("gnu", long + "{:05d}", tarfile.GNU_FORMAT, ("png",)),
            make_shard("pax", long + "{:05d}", tarfile.PAX_FORMAT, ("jpg",)),
            make_shard("pax names", "ünï{:05d}", tarfile.PAX_FORMAT, ("webp",)),
        ]
        self.outcomes: Counter[str] = Counter()

    def whole(self, number: int) -> tuple[Shard, Damaged]:
        """The shard of a case, and its bytes before the damage."""
        shard = self.shards[number % len(self.shards)]
        content = np.frombuffer(shard.content, dtype=np.uint8)
        return shard, Damaged(content, np.arange(len(content)))

    def case(self, number: int) -> None:
        """Raises `Violation`, which names the case, or whatever the reader should not have raised."""
        random = np.random.default_rng([self.seed, number])
        shard, damaged = self.whole(number)
        names = random.choice(list(MUTATIONS), random.choice([1, 1, 1, 2])).tolist()
        if "name" in names:
            # with a second damage that hides what it left behind, it could not be noticed
            names = ["name"]
        for name in names:
            if len(damaged.content):
                damaged = MUTATIONS[name](damaged, shard, random)
        try:
            self._read(shard, damaged, random)
        except CLEAR as error:
            self.outcomes[type(error).__name__] += 1
        except Exception as error:
            raise Violation(
                f"case {number} of seed {self.seed}: {shard.name}, {'+'.join(names)}: {error!r}"
            ) from error

    def _read(self, shard: Shard, damaged: Damaged, random: Random) -> None:
        content = damaged.content.tobytes()
        os.ftruncate(self.file, len(content))
        os.pwrite(self.file, content, 0)
        index = scan(self.path)
        self.outcomes.update(f"torn: {cause}" for cause in index.torn_causes.tolist())
        self.outcomes["samples"] += len(index)
        check_members(shard, damaged, index)
        original = {shard.content[entry.data : entry.data + entry.size] for entry in shard.entries}
        self.outcomes.update(check_samples(content, index, original, random))

    def gzip_case(self, number: int) -> None:
        """The same for a gzipped shard: what could be unpacked is compared place by place."""
        random = np.random.default_rng([self.seed, number, 1])
        shard = self.shards[number % len(self.shards)]
        packed = np.frombuffer(gzip.compress(shard.content, mtime=0), dtype=np.uint8)
        damaged = Damaged(packed, np.arange(len(packed)))
        mutation = list(MUTATIONS)[number % 7]
        place = Shard("gzip", b"", [Entry(0, 0, 0, 12, len(packed) - 12)], [], [])
        damaged = MUTATIONS[mutation](damaged, place, random)
        path = self.folder / f"{number}.tar.gz"
        path.write_bytes(damaged.content.tobytes())
        try:
            unpacked = np.fromfile(local_tar(str(path), self.folder / "cache"), dtype=np.uint8)
            origin = np.arange(len(unpacked))
            both = min(len(unpacked), len(shard.content))
            whole = np.frombuffer(shard.content, dtype=np.uint8)
            origin[:both][unpacked[:both] != whole[:both]] = -1
            origin[both:] = -1
            self._read(shard, Damaged(unpacked, origin), random)
        except CLEAR as error:
            self.outcomes[type(error).__name__] += 1
        except Exception as error:
            raise Violation(f"gzip case {number} of seed {self.seed}: {mutation}: {error!r}") from error


def main() -> None:
    """Fuzz for a while and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fuzz, number, end = Fuzz(Path(folder), arguments.seed), 0, time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            fuzz.case(number)
            if number % 20 == 0:
                fuzz.gzip_case(number)
            number += 1
    print(f"{number} cases: {dict(fuzz.outcomes.most_common())}")


if __name__ == "__main__":
    main()
