"""What the decision needs to know of every sample of a shard: the task of one process, kept until the run is complete.

The image is decoded last, and only of samples that no rule drops.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.filter.balance_spec import BalanceSpec, load_spec
from data_tools.filter.fingerprint import COLOURS, fingerprint
from data_tools.filter.rules import Fields, Looked, Rule, RuleOptions, build_rules
from data_tools.shared.reading import image_header, read_rows
from data_tools.stats.counters import digest
from data_tools.stats.texts import encodable, normalised
from siglip_train.data.image_file import decode
from siglip_train.data.remote.limits import MAX_PIXELS
from siglip_train.data.remote.locations import short_name
from siglip_train.data.shards.faults import BadSample, plain_detail
from siglip_train.data.shards.fields import read_facts
from siglip_train.data.shards.reader import damaged_samples, indexed_tar
from siglip_train.files.atomic import appearing


@dataclass(frozen=True)
class Wanted:
    """What is looked for. spec: the file of `--balance`; facts: must `json` be one object, or absent?

    max_pixels: of an image; one with more is broken.
    """

    rules: RuleOptions
    headers_only: bool = False
    images: bool = False
    texts: bool = False
    spec: str | None = None
    facts: bool = False
    max_pixels: int = MAX_PIXELS


class LookTask(NamedTuple):
    """Which shard, where downloads are, what for, and where the result goes."""

    url: str
    cache: Path
    wanted: Wanted
    target: Path


@dataclass
class Seen:
    """The n samples of a shard; columns that are not wanted are empty.

    keys, languages: `[n]` UTF-8, a quarter of the memory of text. failed: `[n, rules]`. broken: `[n]`, for causes see
    `faults`, which also has the samples that the torn end of a shard has cut. hashes, colours: fingerprints, `[n]` and
    `[n, 192]`. texts: `[n]` digests of the captions, `has_text`: is there one? shows: `[n, values + concepts]`.
    digests: `[n]` of keys.
    """

    keys: NDArray[np.bytes_]
    languages: NDArray[np.bytes_]
    failed: NDArray[np.bool_]
    broken: NDArray[np.bool_]
    hashes: NDArray[np.uint64]
    colours: NDArray[np.uint8]
    texts: NDArray[np.uint64]
    has_text: NDArray[np.bool_]
    shows: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    faults: list[BadSample]

    def save(self, path: Path) -> None:
        """Write it; that it is there means that the shard has been looked at."""
        arrays = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "faults"}
        with appearing(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays, faults=np.array(json.dumps(self.faults)))

    @classmethod
    def load(cls, path: Path) -> "Seen":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in arrays.files if name != "faults"}
            return cls(**columns, faults=[BadSample(*each) for each in json.loads(str(arrays["faults"]))])


class Criteria:
    """What is wanted, made ready. Raises `UserError` for what is none."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.fields = Fields(wanted.rules)
        self.rules: list[Rule] = build_rules(wanted.rules)
        self.spec: BalanceSpec | None = load_spec(wanted.spec) if wanted.spec else None


# one process has many shards
@functools.lru_cache(1)
def criteria(wanted: Wanted) -> Criteria:
    """`Criteria(wanted)`, made once a process."""
    return Criteria(wanted)


def look_at_shard(task: LookTask) -> int:
    """Look at every sample of a shard and save what was seen; return their number.

    Raises `UserError` where the shard cannot be read: what it holds must not go missing without a word.
    """
    path, index = indexed_tar(task.url, task.cache)
    name = short_name(task.url)
    seen = _Collector(criteria(task.wanted), len(index))
    for row, sample in enumerate(read_rows(path, name, index, range(len(index)))):
        seen.look(row, Looked(sample, seen.criteria.fields))
    seen.faults += damaged_samples(name, path, index)
    seen.result().save(task.target)
    return len(index)


class _Collector:
    """The columns of a shard while they are filled."""

    def __init__(self, criteria: Criteria, count: int) -> None:
        self.criteria, wanted, spec = criteria, criteria.wanted, criteria.spec
        self.keys: list[str] = []
        self.languages: list[str] = []
        self.faults: list[BadSample] = []
        self.failed = np.zeros((count, len(criteria.rules)), dtype=bool)
        self.broken = np.zeros(count, dtype=bool)
        self.hashes = np.zeros(count * wanted.images, dtype=np.uint64)
        self.colours = np.zeros((len(self.hashes), COLOURS), dtype=np.uint8)
        self.texts = np.zeros(count * wanted.texts, dtype=np.uint64)
        self.has_text = np.zeros(len(self.texts), dtype=bool)
        traits = len(spec.values) + len(spec.concepts) if spec else 0
        self.shows = np.zeros((count if spec else 0, traits), dtype=bool)
        self.digests = np.zeros(len(self.shows), dtype=np.uint64)

    def look(self, row: int, looked: Looked) -> None:
        """Fill one row. A sample that cannot be read is counted, never raised."""
        self.keys.append(looked.sample.key)
        self.languages.append(looked.language)
        for column, rule in enumerate(self.criteria.rules):
            with self._counting_faults(row, looked):
                self.failed[row, column] = not rule.holds(looked)
        if not self.failed[row].any() and not self.broken[row]:
            with self._counting_faults(row, looked):
                self._look_inside(row, looked)

    @contextlib.contextmanager
    def _counting_faults(self, row: int, looked: Looked) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a sample that no one foresaw must not end the run
            if not self.broken[row]:
                bad = BadSample.of(looked.sample.shard, looked.sample.key, error)
                self.faults.append(bad._replace(detail=plain_detail(bad.detail)))
            self.broken[row] = True

    def _look_inside(self, row: int, looked: Looked) -> None:
        wanted, spec = self.criteria.wanted, self.criteria.spec
        if wanted.facts:
            read_facts(looked.sample.members)
        if wanted.texts:
            captions = sorted({normalised(caption) for caption in looked.captions})
            self.has_text[row] = bool(captions)
            self.texts[row] = digest(encodable("\0".join(captions)).encode())
        if spec:
            traits = [*(trait for values in spec.attributes.values() for trait in values.values()),
                      *spec.concepts.values()]  # fmt: skip
            self.shows[row] = [trait.is_shown(looked.sample, looked.captions) for trait in traits]
            self.digests[row] = digest(looked.sample.key.encode())
        if wanted.headers_only:
            image_header(looked.image_bytes, wanted.max_pixels)
            return
        image = decode(looked.image_bytes, wanted.max_pixels, strict=True)
        if wanted.images:
            self.hashes[row], self.colours[row] = fingerprint(image)

    def result(self) -> Seen:
        """All columns."""
        return Seen(
            np.array([key.encode() for key in self.keys], dtype=np.bytes_),
            np.array([language.encode() for language in self.languages], dtype=np.bytes_),
            self.failed,
            self.broken,
            self.hashes,
            self.colours,
            self.texts,
            self.has_text,
            self.shows,
            self.digests,
            self.faults,
        )
