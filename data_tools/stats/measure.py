"""The work of a process: read the samples of one shard and count them into a `Tally`."""

import contextlib
import functools
import time
from dataclasses import dataclass
from pathlib import Path

from data_tools.shared.reading import first_text, image_header, read_rows
from data_tools.stats.tally import Shown, Tally
from data_tools.stats.texts import encodable, normalised, words
from siglip_train.data.image_file import decode
from siglip_train.data.remote.locations import short_name
from siglip_train.data.shards.faults import BadSample
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample, damaged_samples, indexed_tar
from siglip_train.data.tokenizer import TextRules, Tokenizer, load_tokenizer
from siglip_train.errors import SampleError, UserError
from siglip_train.report.thumbnail import thumbnail

# as in data.sources, in order of preference
_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
# of a text that is kept as such, to be listed
_LISTED_CHARACTERS = 300
_SHOWN_CAPTIONS = 3


@dataclass(frozen=True)
class Measures:
    """What is read of each sample. language, labels: the first field with a value counts."""

    text: tuple[Field, ...]
    language: tuple[Field, ...]
    labels: tuple[Field, ...]
    tokenizer: str | None = None
    context_length: int = 64


@dataclass(frozen=True)
class ShardTask:
    """One shard. cache: where downloads are; most: samples to read, None = all; decoded: of those, for speed; shown: of
    those, in the report.
    """

    url: str
    measures: Measures
    cache: Path
    most: int | None = None
    decoded: int = 0
    shown: int = 0


def spread(length: int, count: int) -> list[int]:
    """At most `count` positions, evenly over 0..length-1."""
    count = min(length, count)
    return [position * length // count for position in range(count)]


def measure_shard(task: ShardTask) -> Tally:
    """Count one shard. A shard that cannot be read counts as one bad sample, named "?"."""
    tally, name = Tally(), short_name(task.url)
    try:
        path, index = indexed_tar(task.url, task.cache)
    except UserError as error:
        tally.bad.add(BadSample(name, "?", "broken shard", str(error)))
        return tally
    tally.shards, tally.shard_bytes = 1, path.stat().st_size
    for bad in damaged_samples(name, path, index):
        tally.bad.add(bad)
    rows = spread(len(index), len(index) if task.most is None else task.most)
    decoded, shown = set(spread(len(rows), task.decoded)), set(spread(len(rows), task.shown))
    for place, sample in enumerate(read_rows(path, name, index, rows)):
        counted = _Counted(sample, task.measures, tally)
        counted.count(is_decoded=place in decoded)
        if place in shown:
            counted.show()
    # small before it travels to the process that merges
    tally.images.settle()
    tally.captions.settle()
    return tally


@functools.lru_cache(1)
def _tokenizer(path: str, context_length: int) -> Tokenizer:
    # nothing is padded here, so a tokenizer without a padding token will do
    return load_tokenizer(path, TextRules(pad="eos"), context_length)


class _Counted:
    """One sample on its way into the tally."""

    def __init__(self, sample: RawSample, measures: Measures, tally: Tally) -> None:
        self.sample, self.measures, self.tally = sample, measures, tally
        self.texts: list[tuple[str, str]] = []
        self.image = next((sample.members[name] for name in _IMAGES if name in sample.members), None)
        self.size = (0, 0)

    def count(self, *, is_decoded: bool) -> None:
        """Count everything; what fails is named, once for each cause."""
        self.tally.samples += 1
        faults: dict[str, SampleError] = {}
        parts = [self._count_image, self._count_captions, self._count_labels]
        for part in [*parts, self._decode] if is_decoded else parts:
            try:
                part()
            except SampleError as error:
                faults.setdefault(error.cause, error)
        for fault in faults.values():
            self.tally.bad.add(BadSample.of(self.sample.shard, self.sample.key, fault))

    def show(self) -> None:
        """Keep the sample for the report, unless it has no readable image."""
        with contextlib.suppress(SampleError):
            url = thumbnail(decode(self.image or b""), 192)
            captions = tuple(self.texts[:_SHOWN_CAPTIONS])
            self.tally.shown.append(Shown(self.sample.name, *self.size, url, captions))

    def _count_image(self) -> None:
        if self.image is None:
            raise SampleError("no image", f"none of {', '.join(_IMAGES)}")
        tally, (kind, width, height) = self.tally, image_header(self.image)
        self.size = (width, height)
        tally.image_bytes.add(len(self.image))
        tally.images.add(self.image)
        tally.formats[kind] += 1
        tally.widths.add(width)
        tally.heights.add(height)
        tally.megapixels.add(width * height / 1e6)
        tally.aspects.add(width / height)

    def _decode(self) -> None:
        if self.image is None:
            return
        # of this thread, so that other processes on the core do not count
        start = time.thread_time()
        decode(self.image)
        self.tally.decode_seconds += time.thread_time() - start
        self.tally.decoded += 1
        self.tally.decoded_bytes += len(self.image)
        self.tally.decoded_megapixels += self.size[0] * self.size[1] / 1e6

    def _count_captions(self) -> None:
        fault = None
        for field in self.measures.text:
            try:
                self.texts += field.texts(self.sample)
            except SampleError as error:
                fault = fault or error
        self.tally.captions_per_image.add(len(self.texts))
        language = first_text(self.measures.language, self.sample)
        self.texts = [(encodable(key) or language, encodable(text)) for key, text in self.texts]
        for name, text in self.texts:
            self._count_caption(name or "unknown", text)
        if fault is not None:
            raise fault
        if not self.texts:
            fields = self.measures.text
            if not any(field.member in self.sample.members for field in fields):
                raise SampleError("no text", "only " + ", ".join(self.sample.members))
            raise SampleError("empty caption", f"no text in {', '.join(field.text for field in fields)}")

    def _count_caption(self, language: str, text: str) -> None:
        tally, measures = self.tally, self.measures
        tally.characters.add(len(text))
        tally.languages[language] += 1
        tally.language_characters[language] += len(text)
        tally.captions.add(normalised(text).encode())
        if len(text) <= _LISTED_CHARACTERS:
            tally.frequent_captions.add(text)
        for word in words(text):
            tally.words.add(word[:_LISTED_CHARACTERS])
        if measures.tokenizer is not None:
            tokenizer = _tokenizer(measures.tokenizer, measures.context_length)
            tokens = len(tokenizer.encoder.encode(tokenizer.rules.clean(text))) + 1
            tally.tokens.add(tokens)
            tally.language_tokens[language] += tokens
            tally.over_length += tokens > measures.context_length

    def _count_labels(self) -> None:
        for field in self.measures.labels:
            labels = [label for _, label in field.texts(self.sample)]
            if labels:
                self.tally.objects_per_image.add(len(labels))
                for label in labels:
                    self.tally.labels.add(encodable(label)[:_LISTED_CHARACTERS])
                return
