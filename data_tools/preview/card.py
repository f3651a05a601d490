"""What the page shows of one sample: its image with boxes and mask, its captions, where it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.preview.overlay import PlacedBox, css, mask_url, placed
from data_tools.shared.facts import BOX_FIELDS, Box, boxes, language
from siglip_train.data.image_file import decode
from siglip_train.data.packing.images import read_mask
from siglip_train.data.shards.fields import Field, read_facts
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import SampleError
from siglip_train.report.thumbnail import data_url

_SIDE = 256
# below it pixels are shown as pixels, since browsers blur
_SMALL = 128
_LEGEND = 12


@dataclass
class Card:
    """One sample for `templates/preview.html`; what cannot be read says so in `faults`.

    url, masks: the image and its class map as data URLs, "" without; width, height: pixels of both.
    legend: (colour, class) of the largest classes; captions: (language or "", text).
    """

    places: list[str]
    url: str = ""
    width: int = 0
    height: int = 0
    masks: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    boxes: list[PlacedBox] = field(default_factory=list)
    captions: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def is_small(self) -> bool:
        """Are the pixels to be seen as such?"""
        return max(self.width, self.height) < _SMALL


def card(
    sample: RawSample, image: Sequence[str], text: Sequence[Field], box_fields: Sequence[str] = BOX_FIELDS
) -> Card:
    """Read a sample. image: extensions in order of preference. box_fields: of json, lists of boxes."""
    made = Card([part for part in (sample.key, sample.shard) if part])
    facts: dict[str, Any] = {}
    try:
        facts = read_facts(sample.members)
    except SampleError as error:
        made.faults.append(str(error))
    try:
        _add_image(made, sample.members, list(boxes(facts, box_fields)), facts, image)
    except SampleError as error:
        made.faults.append(str(error))
    _add_captions(made, sample, facts, text)
    made.faults = list(dict.fromkeys(made.faults))
    return made


def _add_image(
    made: Card,
    members: Mapping[str, bytes],
    found: Sequence[Box],
    facts: Mapping[str, Any],
    image: Sequence[str],
) -> None:
    data = next((members[extension] for extension in image if extension in members), None)
    if data is None:
        made.faults.append("no image")
        return
    decoded = decode(data)
    made.places.append(f"{decoded.width}\u00a0×\u00a0{decoded.height}")
    decoded.thumbnail((_SIDE, _SIDE))
    made.url, (made.width, made.height) = data_url(decoded), decoded.size
    made.boxes = placed(found, *decoded.size)
    if "mask.png" not in members:
        return
    mask = read_mask(members["mask.png"])
    made.masks, pixels = mask_url(mask, decoded.size), mask.histogram()
    names = facts.get("classes")
    names = names if isinstance(names, dict) else {}
    largest = sorted(
        (number for number in range(1, 256) if pixels[number]), key=lambda number: -pixels[number]
    )
    made.legend = [(css(number), str(names.get(str(number), number))) for number in largest[:_LEGEND]]


def _add_captions(made: Card, sample: RawSample, facts: Mapping[str, Any], text: Sequence[Field]) -> None:
    lines: dict[tuple[str, str], None] = {}
    for each in text:
        try:
            # the json says the language of `txt`; a mapping says its own
            spoken = language(facts) if each.member == "txt" else ""
            lines |= dict.fromkeys((key or spoken, value) for key, value in each.texts(sample))
        except SampleError as error:
            made.faults.append(str(error))
    made.captions = list(lines)
