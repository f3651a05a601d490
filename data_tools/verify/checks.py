"""What can be wrong inside one sample: member names, captions, image, mask, boxes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_tools.shared.facts import are_corners, boxes
from siglip_train.data.image_file import decode, has_16_bits
from siglip_train.data.packing.images import read_mask
from siglip_train.data.remote.limits import MAX_PIXELS
from siglip_train.data.shards.fields import Field, no_caption, read_facts
from siglip_train.data.shards.labels import labels_of
from siglip_train.data.shards.reader import RawSample
from siglip_train.data.tokenizer import load_tokenizer
from siglip_train.errors import SampleError

_MASK = "mask.png"
# of 255: what data of 14 bits or fewer stay below
_DARK = 64


@dataclass(frozen=True)
class Rules:
    """What a good sample is.

    image: extensions in order of preference. text: fields that hold captions, () = none is wanted. label: the field of
    the class, None = none is wanted. min_side: pixels. max_pixels: of an image. max_aspect: long side over
    short side. tokenizer: path, None = lengths are not looked at. context_length: tokens, with the end.
    """

    image: tuple[str, ...]
    text: tuple[str, ...] = ("txt",)
    label: str | None = None
    min_side: int = 16
    max_pixels: int = MAX_PIXELS
    max_aspect: float = 10.0
    tokenizer: str | None = None
    context_length: int = 64


class SampleChecks:
    """Finds the faults of a sample. Raises `UserError` for a field or tokenizer that is none."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.fields = [Field.parse(text) for text in rules.text]
        self.label = Field.parse(rules.label) if rules.label else None
        self.tokenizer = (
            load_tokenizer(rules.tokenizer, context_length=rules.context_length) if rules.tokenizer else None
        )

    def faults(self, sample: RawSample) -> list[SampleError]:
        """The faults of a sample with all its members, each cause once."""
        found = {fault.cause: fault for fault in reversed(list(self._all(sample)))}
        return list(reversed(found.values()))

    def _all(self, sample: RawSample) -> Iterator[SampleError]:
        dotted = list(self._dots(sample))
        yield from dotted
        facts: dict[str, Any] | None = None
        try:
            facts = read_facts(sample.members)
            yield from _box_faults(facts)
        except SampleError as error:
            yield error
        # what a dotted name took away is not missing for another reason
        missing = [] if dotted else list(self._missing(sample.members))
        yield from missing
        if self._has_text(sample.members):
            yield from self._captions(sample, has_json=facts is not None)
        if not dotted:
            yield from self._label(sample, has_json=facts is not None)
        yield from self._image(sample.members, facts or {})

    def _has_image(self, members: Mapping[str, bytes]) -> bool:
        return any(extension in members for extension in self.rules.image)

    def _has_text(self, members: Mapping[str, bytes]) -> bool:
        return any(field.member in members for field in self.fields)

    def _missing(self, members: Mapping[str, bytes]) -> Iterator[SampleError]:
        present = "only " + ", ".join(members)
        if not self._has_image(members):
            yield SampleError("no image", present)
        if self.fields and not self._has_text(members):
            yield SampleError("no text", present)

    def _dots(self, sample: RawSample) -> Iterator[SampleError]:
        """Names that mean another key than the one up to the first dot of the file name."""
        folder = sample.key.rpartition("/")[0]
        if any("." in part for part in folder.split("/") if part not in (".", "..")):
            yield SampleError("dotted key", f"a dot in the folder {folder}: some readers end the key there")
        name = self._swallowed(sample.members)
        if name:
            yield SampleError("dotted key", f"read as {name} of sample {sample.key}")

    def _swallowed(self, members: Mapping[str, bytes]) -> str:
        """The first member, such as `b.jpg`, that was meant to be an image or caption of sample `a.b`."""
        stems: dict[str, set[str]] = {}
        for extension in members:
            stem, dot, last = extension.rpartition(".")
            if dot and extension != _MASK:
                stems.setdefault(stem, set()).add(last)
        for stem, lasts in stems.items():
            images = lasts.intersection(self.rules.image)
            texts = lasts.intersection(field.member for field in self.fields)
            # `depth.png` beside an image is an extension; `b.jpg` without one, or with `b.txt`, is not
            if (
                (images and texts)
                or (images and not self._has_image(members))
                or (texts and not self._has_text(members))
            ):
                return f"{stem}.{min(images or texts)}"
        return ""

    def _captions(self, sample: RawSample, *, has_json: bool) -> Iterator[SampleError]:
        texts: list[str] = []
        readable = True
        for field in self.fields:
            if field.member == "json" and not has_json:
                readable = False
                continue
            try:
                texts += [text for _, text in field.texts(sample)]
            except SampleError as error:
                readable = False
                yield error
        if not texts and readable:
            yield no_caption(self.fields, sample)
        yield from self._lengths(texts)

    def _lengths(self, texts: list[str]) -> Iterator[SampleError]:
        if self.tokenizer is None or not texts:
            return
        # the end takes a place too
        longest = 1 + max(
            len(self.tokenizer.encoder.encode(self.tokenizer.rules.clean(text))) for text in texts
        )
        if longest > self.rules.context_length:
            yield SampleError("long caption", f"{longest} tokens, limit {self.rules.context_length}")

    def _label(self, sample: RawSample, *, has_json: bool) -> Iterator[SampleError]:
        if self.label is None or (self.label.member == "json" and not has_json):
            return
        try:
            if self.label.first(sample) is None:
                yield SampleError("no label", f"nothing in {self.label.text}")
            elif min(labels_of(self.label, sample), default=0) < 0:
                yield SampleError("bad label", f"{self.label.text} is negative")
        except SampleError as error:
            yield error

    def _image(self, members: Mapping[str, bytes], facts: Mapping[str, Any]) -> Iterator[SampleError]:
        data = next((members[extension] for extension in self.rules.image if extension in members), None)
        size = None
        if data is not None:
            try:
                decoded = decode(data, self.rules.max_pixels, strict=True)
                size = decoded.size
                yield from _dark_faults(data, decoded)
                yield from self._extremes(*size)
                yield from _size_faults(facts, *size)
            except SampleError as error:
                yield error
        if _MASK in members:
            yield from _mask_faults(members[_MASK], size)

    def _extremes(self, width: int, height: int) -> Iterator[SampleError]:
        if min(width, height) < self.rules.min_side:
            yield SampleError("small picture", f"{width} x {height}, shortest side {self.rules.min_side}")
        if max(width, height) > self.rules.max_aspect * min(width, height):
            yield SampleError("extreme aspect", f"{width} x {height}, limit {self.rules.max_aspect:g} to 1")


def _dark_faults(data: bytes, decoded: Image.Image) -> Iterator[SampleError]:
    """Levels of 12 bits in an image of 16 are a sixteenth of what they should be, and no one can see it in numbers."""
    if not has_16_bits(data):
        return
    highest = max(high for _, high in decoded.getextrema())  # type: ignore[misc]
    if highest < _DARK:
        yield SampleError(
            "dark 16-bit picture",
            f"no level above {highest} of 255: if its data have fewer bits, siglip-data pack --grey-bits scales them",
        )


def _size_faults(facts: Mapping[str, Any], width: int, height: int) -> Iterator[SampleError]:
    said = [(name, facts.get(name), side) for name, side in (("width", width), ("height", height))]
    if any(type(value) in (int, float) and value != side for _, value, side in said):
        stated = ", ".join(f"{name} {value}" for name, value, _ in said)
        yield SampleError("wrong size", f"json says {stated}, but the image is {width} x {height}")


def _box_faults(facts: Mapping[str, Any]) -> Iterator[SampleError]:
    if not isinstance(facts.get("objects"), list | None):
        yield SampleError("bad box", f"objects is {facts['objects']!r}, not a list")
    for box in boxes(facts):
        if not are_corners(box.corners):
            yield SampleError("bad box", f"{box.place} is {box.corners}, not x0 < x1, y0 < y1 in 0..1")


def _mask_faults(data: bytes, size: tuple[int, int] | None) -> Iterator[SampleError]:
    """size: of the image, None where it is not known."""
    try:
        mask = read_mask(data)
    except SampleError as error:
        yield error
        return
    if size is not None and mask.size != size:
        yield SampleError("mask size", "{} x {}, but the image {} x {}".format(*mask.size, *size))
