"""What is counted of shards: one `Tally` a shard, merged in the order of the shards."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from data_tools.stats.counters import BadSamples, Distinct, Distribution, Frequent


class Shown(NamedTuple):
    """A sample for the report. url: its small image as a data URL; captions: (language or "", text)."""

    name: str
    width: int
    height: int
    url: str
    captions: tuple[tuple[str, str], ...]


@dataclass
class Tally:
    """Counts of any number of samples.

    shard_bytes: of the tars, unpacked. aspects: width / height. languages, language_characters, language_tokens:
    number of captions and the sums over them. tokens count the end token, as the context length does.
    decode_seconds: of processor time, for `decoded` images of so many bytes and megapixels.
    """

    shards: int = 0
    shard_bytes: int = 0
    samples: int = 0
    image_bytes: Distribution = field(default_factory=Distribution)
    widths: Distribution = field(default_factory=Distribution)
    heights: Distribution = field(default_factory=Distribution)
    megapixels: Distribution = field(default_factory=Distribution)
    aspects: Distribution = field(default_factory=Distribution)
    formats: Counter[str] = field(default_factory=Counter)
    images: Distinct = field(default_factory=Distinct)
    captions_per_image: Distribution = field(default_factory=Distribution)
    characters: Distribution = field(default_factory=Distribution)
    tokens: Distribution = field(default_factory=Distribution)
    over_length: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    language_characters: Counter[str] = field(default_factory=Counter)
    language_tokens: Counter[str] = field(default_factory=Counter)
    captions: Distinct = field(default_factory=Distinct)
    frequent_captions: Frequent = field(default_factory=Frequent)
    words: Frequent = field(default_factory=Frequent)
    objects_per_image: Distribution = field(default_factory=Distribution)
    labels: Frequent = field(default_factory=Frequent)
    decoded: int = 0
    decoded_bytes: int = 0
    decoded_megapixels: float = 0
    decode_seconds: float = 0
    bad: BadSamples = field(default_factory=BadSamples)
    shown: list[Shown] = field(default_factory=list)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, int | float | list):
                setattr(self, each.name, mine + theirs)
            elif isinstance(mine, Counter):
                mine.update(theirs)
            else:
                mine.merge(theirs)
