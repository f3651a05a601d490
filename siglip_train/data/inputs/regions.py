"""Regions of an image as sentences: one by its expression and then its box, another by its box and then its text."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from siglip_train.data.choices import Choices
from siglip_train.data.config import SourceConfig
from siglip_train.data.image_file import Encoded
from siglip_train.data.image_transform import View
from siglip_train.data.inputs.base import Empty, Input, InputSetup
from siglip_train.data.sentences import RelativeBox, Sentence, SentenceForm
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample, ShardReader
from siglip_train.errors import SampleError, UserError

# samples of which one at least must have the key, which of a share of one in a hundred is as good as certain
_LOOKED_AT = 1000
# edges are rounded by whoever wrote them
_SLACK = 1e-3
_PUNCTUATION = ".,;:!?()[]\"'،؛।。、，；：！？「」（）"
# the first letter of writing that puts no spaces between words
_WITHOUT_SPACES = "\u2e80"


class Region(NamedTuple):
    """A box, as shares of the image, and what it shows."""

    box: RelativeBox
    text: str
    score: float


def read_regions(where: Field, sample: RawSample) -> list[Region]:
    """The regions of a sample, [] where it has none: `{box, text | label[, score][, crowd]}` each, crowds left out.

    Raises `SampleError` for boxes that are outside of the image, empty, swapped or no numbers.
    """
    found = where.node(sample)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise SampleError(
            "regions are no list", f"{where.text} is {found!r:.60}, and must be a list of {{box, text}}"
        )
    return [_region(where, each) for each in found if not each.get("crowd")]


def _region(where: Field, found: dict[str, Any]) -> Region:
    box, text, score = found.get("box"), found.get("text", found.get("label")), found.get("score", 1.0)
    if not isinstance(text, str) or not text.strip():
        raise SampleError("region without text", f"{where.text} has a region whose text is {text!r:.60}")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or not _is_number(score):
        raise SampleError("bad box", f"{where.text}: {box!r:.80} with score {score!r:.20} is no box")
    left, top, right, bottom = box
    if max(box) > 2 and min(box) >= 0:
        raise SampleError(
            "box in pixels", f"{where.text}: {box} is no box of shares 0..1 of width and height"
        )
    if not (-_SLACK <= left < right <= 1 + _SLACK and -_SLACK <= top < bottom <= 1 + _SLACK):
        raise SampleError("bad box", f"{where.text}: {box} is not left < right, top < bottom within 0..1")
    return Region(tuple(min(max(float(edge), 0.0), 1.0) for edge in box), text.strip(), float(score))  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def seen_through(region: Region, view: View, min_visible: float, side_words: Sequence[str]) -> Region | None:
    """A region as the cropped and mirrored image shows it; None where too little of it is left, or it names a side."""
    left, top, right, bottom = region.box
    crop_left, crop_top, crop_right, crop_bottom = view.crop
    wide, high = crop_right - crop_left, crop_bottom - crop_top
    inner = (max(left, crop_left), max(top, crop_top), min(right, crop_right), min(bottom, crop_bottom))
    area = max(0.0, inner[2] - inner[0]) * max(0.0, inner[3] - inner[1])
    if area <= 0 or area < min_visible * (right - left) * (bottom - top):
        return None
    box = (
        (inner[0] - crop_left) / wide, (inner[1] - crop_top) / high,
        (inner[2] - crop_left) / wide, (inner[3] - crop_top) / high,
    )  # fmt: skip
    if view.is_mirrored:
        if names_a_side(region.text, side_words):
            return None
        box = (1 - box[2], box[1], 1 - box[0], box[3])
    return region._replace(box=box)


def names_a_side(text: str, side_words: Sequence[str]) -> bool:
    """Whether a text has one of the words; those of writing without spaces (Chinese, Japanese) are parts of it."""
    text = text.lower()
    words = {word.strip(_PUNCTUATION) for word in text.split()}
    return any(word in words or (word >= _WITHOUT_SPACES and word in text) for word in side_words)


class RegionInput(Input):
    """`{"arf": Sentences, "gcap": Sentences}`: of each sample one region, and another one where there are several."""

    part = "regions"

    def __init__(self, setup: InputSetup) -> None:
        if setup.run.tokenizer is None:
            raise UserError("regions need a tokenizer: tokenizer=PATH to a .model or a tokenizer.json")
        self.field = None if self.is_absent(setup.source) else _field(setup.name, setup.source)
        self.options = setup.data.regions
        self.form = SentenceForm(setup.data.sentences, setup.run.tokenizer)
        self.transform, self.max_pixels = setup.run.transform, setup.data.max_image_pixels
        if self.field is not None:
            _check_key(self.field, setup.name, setup.reader)

    @classmethod
    def is_absent(cls, source: SourceConfig) -> bool:
        """Where it has neither captions nor regions."""
        return source.text is None and source.regions is None

    @classmethod
    def members(cls, name: str, source: SourceConfig) -> tuple[str, ...]:
        """The json member; the image too, whose crop and mirror the boxes follow."""
        return (_field(name, source).member, "image")

    def decide(self, sample: RawSample, choices: Choices) -> None:
        """Do not mirror an image of which a region's text names a side, where the options say so."""
        options = self.options
        if self.field is not None and self.transform.flip and options.side_texts == "no_mirror":
            found = (each for each in read_regions(self.field, sample) if each.score >= options.min_score)
            if any(names_a_side(each.text, options.side_words) for each in found):
                choices.once("mirror", lambda _: False)

    def make(self, sample: RawSample, choices: Choices) -> tuple[Sentence | None, Sentence | None]:
        """An expression with its box, and a box with its text. Raises `SampleError`."""
        if self.field is None:
            return None, None
        options, found = self.options, read_regions(self.field, sample)
        if found and not self.transform.is_plain:
            size = Encoded(sample.members["image"], self.max_pixels, strict=True).size
            view = self.transform.view(size, choices)
            through = (seen_through(each, view, options.min_visible, options.side_words) for each in found)
            found = [region for region in through if region is not None]
        found = [region for region in found if region.score >= options.min_score]
        if not found:
            return None, None
        count = len(found)
        first = int(choices.generator.integers(count))
        second = (first + 1 + int(choices.generator.integers(count - 1))) % count if count > 1 else first
        one, other = found[first], found[second]
        return self.form.expression(one.text, one.box), self.form.grounded(other.box, other.text)

    def collate(self, rows: list[Any], empty: Empty) -> dict[str, Any]:
        """Put the sentences of each task together."""
        return {
            task: self.form.rows([row[place] for row in rows]) for place, task in enumerate(("arf", "gcap"))
        }


def _field(name: str, source: SourceConfig) -> Field:
    if source.regions is None:
        raise UserError(
            f"data.sources.{name}.regions is null, and an objective needs regions: set it to the field with the list"
            " (json:regions), or leave its tasks out (objectives.captioning.tasks=[cap])"
        )
    where = Field.parse(source.regions)
    if not where.path:
        raise UserError(f"data.sources.{name}.regions is {source.regions}: name a json field, json:regions")
    return where


def _check_key(where: Field, name: str, reader: ShardReader) -> None:
    """Raise `UserError` where none of the first samples has the key.  # all ranks"""
    count = min(_LOOKED_AT, len(reader.shards))
    for number in range(count):
        try:
            if where.node(reader.read(*reader.shards.locate(number))) is not None:
                return
        except SampleError:
            continue
    raise UserError(
        f"data.sources.{name}.regions: none of the first {count} samples has {where.text}; name"
        " the field with the list of {box, text} (siglip-data preview shows the fields of a sample)"
    )
