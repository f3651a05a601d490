"""Raw samples a CPU second: by offset in shuffled order (this project), and as a stream of the `webdataset` library.

Nothing is decoded, and the shards lie in the page cache: what is compared is the work of finding and reading members.
"index" is the one scan of the headers of a tar, after which its samples can be read by offset.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import webdataset
from harness import Row, finish, measure, rows
from loader_shards import prepare_cases

from siglip_train.data.shards.kept_index import load_index
from siglip_train.data.shards.scan import scan
from siglip_train.data.shards.tar import TarIndex, read_member

CASES = ("tiny shapes 128 px", "emoji 64 px", "photographs 224 px")
BASELINES = dict.fromkeys(("ours", "index"), "webdataset")


def by_offset(paths: Sequence[Path], indexes: Sequence[TarIndex]) -> int:
    """Read all members of all samples, in an order that jumps over all shards."""
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    places = [(shard, sample) for shard, index in enumerate(indexes) for sample in range(len(index))]
    for place in np.random.default_rng(0).permutation(len(places)):
        shard, sample = places[place]
        for member in indexes[shard].members(sample).values():
            read_member(indexes[shard], descriptors[shard], member)
    for descriptor in descriptors:
        os.close(descriptor)
    return len(places)


def as_stream(paths: Sequence[Path]) -> int:
    """Read all samples in file order."""
    names = [str(path) for path in paths]
    return sum(1 for _ in webdataset.WebDataset(names, shardshuffle=False, empty_check=False))


def headers(paths: Sequence[Path]) -> int:
    """Index all shards anew."""
    return sum(len(scan(path)) for path in paths)


def rate(read: Callable[[], int]) -> float:
    """Samples per second of CPU time of this process."""
    start = time.process_time()
    samples = read()
    return samples / (time.process_time() - start)


def compare(case: str, paths: Sequence[Path], scratch: Path, rounds: int) -> tuple[list[Row], str]:
    """The rows of a case, and a note on the size of its indexes."""
    cache = scratch / case.replace(" ", "-")
    indexes = [load_index(path, cache) for path in paths]
    contestants = {
        "ours": partial(rate, partial(by_offset, paths, indexes)),
        "index": partial(rate, partial(headers, paths)),
        "webdataset": partial(rate, partial(as_stream, paths)),
    }
    samples = sum(map(len, indexes))
    kept = sum(file.stat().st_size for file in (cache / "indexes").iterdir())
    note = (
        f"{case}: {sum(len(index.offsets) for index in indexes) / samples:.0f} members and "
        f"{sum(path.stat().st_size for path in paths) / samples / 1000:.1f} KB a sample; "
        f"its index takes {kept / samples:.0f} bytes on the disk"
    )
    return rows("reading", case, "samples/CPU s", measure(contestants, rounds=rounds), {}), note


def main() -> None:
    """Compare on generated images, emoji and photographs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep rows and report in results/")
    arguments = parser.parse_args()
    table: list[Row] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = prepare_cases(Path(folder))
        for name in CASES:
            if name in cases:
                paths = [Path(shard).resolve() for shard in cases[name].shards]
                found, note = compare(name, list(dict.fromkeys(paths)), Path(folder), arguments.rounds)
                table += found
                notes.append(note)
    notes.append(f"webdataset {version('webdataset')}, in file order; ours shuffled over all shards")
    finish(table, BASELINES, notes, save=arguments.save)


if __name__ == "__main__":
    main()
