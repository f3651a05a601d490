"""The captions of shards, each with its language, and the same part of them in every run."""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.stats.counters import BadSamples
from siglip_train.data.processes import run_all
from siglip_train.data.progress import progress
from siglip_train.data.remote.locations import expand
from siglip_train.data.shards.faults import BadSample
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample, read_samples, short_name
from siglip_train.errors import SampleError, UserError


@dataclass(frozen=True)
class CaptionFields:
    """Where captions stand, and, if no mapping key names it, their language: the first field with a value."""

    text: tuple[Field, ...]
    language: tuple[Field, ...] = ()


class Caption(NamedTuple):
    """A text in a language, "unknown" where no field names it."""

    language: str
    text: str


def shard_captions(url: str, fields: CaptionFields, cache: Path, bad: BadSamples) -> Iterator[Caption]:
    """Every caption of a shard, in file order. Samples that cannot be read go into `bad`, a whole shard as one."""
    try:
        for sample in read_samples(url, cache):
            fault = None
            for each in fields.text:
                try:
                    yield from _captions(sample, each, fields.language)
                except SampleError as error:
                    fault = fault or error
            if fault is not None:
                bad.add(BadSample.of(sample.shard, sample.key, fault))
    except UserError as error:
        bad.add(BadSample(short_name(url), "?", "broken shard", str(error)))


def _captions(sample: RawSample, text: Field, language: Sequence[Field]) -> Iterator[Caption]:
    found = text.texts(sample)
    if all(key for key, _ in found):
        yield from (Caption(*each) for each in found)
        return
    values = (str(value) for each in language if (value := each.first(sample)))
    own = next(values, "unknown")
    yield from (Caption(key or own, value) for key, value in found)


class _Drawn(NamedTuple):
    """A caption with the order in which captions are drawn, and its place."""

    draw: bytes
    shard: int
    place: int
    text: str


class _Task(NamedTuple):
    url: str
    number: int
    fields: CaptionFields
    most: int
    cache: Path


@dataclass
class Sentences:
    """Captions to train on, out of `found`. bad: samples that could not be read."""

    texts: list[str]
    found: int = 0
    bad: BadSamples = field(default_factory=BadSamples)


def draw_captions(shards: str, fields: CaptionFields, most: int, cache: Path, workers: int) -> Sentences:
    """The captions of all shards in file order, or `most` of them (0 = all); cache: where downloads are.

    They are drawn by a hash of shard, place and text, so that the same shards give the same ones.
    """
    urls = expand(shards)
    tasks = [_Task(url, number, fields, most, cache) for number, url in enumerate(urls)]
    drawn: list[_Drawn] = []
    sentences = Sentences([])
    with progress(len(urls), "reading", "read", "shards") as advance:
        for part, found, bad in run_all(_draw, tasks, workers):
            drawn = _first([*drawn, *part], most)
            sentences.found += found
            sentences.bad.merge(bad)
            advance(1)
    sentences.texts = [each.text for each in sorted(drawn, key=lambda each: (each.shard, each.place))]
    return sentences


def _draw(task: _Task) -> tuple[list[_Drawn], int, BadSamples]:
    bad, found, drawn = BadSamples(), 0, []
    name = short_name(task.url)
    for place, caption in enumerate(shard_captions(task.url, task.fields, task.cache, bad)):
        found += 1
        # without a limit nothing is drawn
        draw = f"{name}\0{place}\0{caption.text}".encode() if task.most else b""
        drawn.append(_Drawn(hashlib.blake2b(draw, digest_size=8).digest(), task.number, place, caption.text))
        if task.most and len(drawn) > 2 * task.most:
            drawn = _first(drawn, task.most)
    return _first(drawn, task.most), found, bad


def _first(drawn: list[_Drawn], most: int) -> list[_Drawn]:
    return heapq.nsmallest(most, drawn) if most else drawn
