"""The index beside shards, `index.json`: what each shard holds, so that it need not be fetched to be counted."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from siglip_train.data.shards.reader import Wanted
from siglip_train.data.shards.tar import TarIndex

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class Entry:
    """What the index says of a shard.

    file: its name. bytes, sha256: of the file. samples, good_samples: as `siglip-data verify` counts them.
    members: how many samples training reads with exactly these members, sorted extensions joined by spaces.
    left_out: samples that damage of the tar keeps from being read, by cause. repeated: samples whose key came before.
    """

    file: str
    bytes: int
    sha256: str
    samples: int
    good_samples: int
    members: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)
    repeated: int = 0

    def complete(self, wanted: Wanted) -> int:
        """How many samples have the wanted members."""
        return sum(count for names, count in self.members.items() if not _lack(names, wanted))

    def incomplete(self, wanted: Wanted) -> Counter[str]:
        """The others by cause, as a scan of the shard would name it."""
        lacks = Counter(self.left_out)
        for names, count in self.members.items():
            lacks[_lack(names, wanted)] += count
        del lacks[""]
        return +lacks


def _lack(names: str, wanted: Wanted) -> str:
    present = set(names.split(" "))
    if present.isdisjoint(wanted.image):
        return "no image"
    return "no text" if wanted.text is not None and present.isdisjoint(wanted.text) else ""


def members_of(index: TarIndex) -> dict[str, int]:
    """How many samples of a tar have exactly which members, the most frequent set first."""
    # an extension with a space is no one's image or text
    extensions = [str(extension).replace(" ", "_") for extension in index.extensions]
    kinds, starts = index.kinds.tolist(), index.starts.tolist()
    sets = Counter(tuple(sorted(kinds[start:end])) for start, end in itertools.pairwise(starts))
    return {" ".join(sorted(extensions[kind] for kind in each)): count for each, count in sets.most_common()}


def left_out_of(index: TarIndex) -> dict[str, int]:
    """How many samples of a damaged tar are not read, by cause."""
    return dict(Counter(index.torn_causes.tolist()))


def index_content(entries: Iterable[Entry]) -> dict[str, Any]:
    """What stands in the file."""
    shards = [asdict(entry) for entry in entries]
    totals = {name: sum(shard[name] for shard in shards) for name in ("samples", "good_samples")}
    return {**totals, "shards": shards}


def read_index(text: str | bytes) -> dict[str, Entry]:
    """The entries by file name, of shards that could be read. Raises ValueError where it is no such index."""
    content = json.loads(text)
    shards = content.get("shards") if isinstance(content, Mapping) else None
    if not isinstance(shards, list):
        raise ValueError("it has no list `shards`")
    try:
        entries = [
            Entry(**{name: shard[name] for name in Entry.__annotations__ if name in shard})
            for shard in shards
        ]
    except TypeError as error:
        raise ValueError(f"an entry lacks something: {error}") from error
    return {entry.file: entry for entry in entries if entry.sha256}
