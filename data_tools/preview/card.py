"""One sample as HTML: its picture with boxes and mask, its captions, where it comes from; all text is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from data_tools.facts import boxes, language, read_facts
from data_tools.preview.overlay import colour, css, data_url, draw_boxes, draw_mask
from data_tools.reading import read_mask
from siglip_train.data.faults import SampleError
from siglip_train.data.images import decode
from siglip_train.data.samples import Field
from siglip_train.data.shards import RawSample

_SIDE = 256
# below it pixels are shown as pixels, since browsers blur
_SMALL = 128
_LEGEND = 12


def card(sample: RawSample, image: Sequence[str], text: Sequence[Field]) -> str:
    """A `figure`; what cannot be read says so in place of itself. image: extensions in order of preference."""
    faults: list[str] = []
    try:
        facts = read_facts(sample.members)
    except SampleError as error:
        facts = {}
        faults.append(str(error))
    picture, size = _picture(sample.members, facts, image, faults)
    captions = _captions(sample, facts, text, faults)
    broken = "".join(f'<p class="fault">{escape(fault)}</p>' for fault in dict.fromkeys(faults))
    places = " · ".join(escape(part) for part in (sample.key, sample.shard, size) if part)
    return (
        f'<figure>{picture}<figcaption>{broken}{captions}<p class="place">{places}</p></figcaption></figure>'
    )


def _picture(
    members: Mapping[str, bytes], facts: Mapping[str, Any], image: Sequence[str], faults: list[str]
) -> tuple[str, str]:
    """(the picture and what lies over it, its size in words)"""
    data = next((members[extension] for extension in image if extension in members), None)
    if data is None:
        faults.append("no image")
        return "", ""
    try:
        picture = decode(data)
    except SampleError as error:
        faults.append(str(error))
        return "", ""
    size = f"{picture.width}\u00a0×\u00a0{picture.height}"
    picture.thumbnail((_SIDE, _SIDE))
    width, height = picture.size
    crisp = ' class="crisp"' if max(width, height) < _SMALL else ""
    layers = f'<img{crisp} src="{data_url(picture, "JPEG")}" alt="">'
    mask, legend = _mask(members, facts, picture.size, faults)
    layers += mask + draw_boxes(list(boxes(facts)), width, height)
    # tall pictures are made narrow, not the page long
    style = f"aspect-ratio: {width} / {height}; max-width: calc(320px * {width / height:.4f})"
    return f'<div class="frame" style="{style}">{layers}</div>{legend}', size


def _mask(
    members: Mapping[str, bytes], facts: Mapping[str, Any], size: tuple[int, int], faults: list[str]
) -> tuple[str, str]:
    """(the overlay, its legend)"""
    if "mask.png" not in members:
        return "", ""
    try:
        mask = read_mask(members["mask.png"])
        overlay, histogram = draw_mask(mask, *size), mask.histogram()
    except SampleError as error:
        faults.append(str(error))
        return "", ""
    names = facts.get("classes")
    names = names if isinstance(names, dict) else {}
    largest = sorted((number for number in range(1, 256) if histogram[number]), key=lambda n: -histogram[n])
    chips = "".join(
        f'<span><i style="background: {css(colour(number))}"></i>{escape(str(names.get(str(number), number)))}</span>'
        for number in largest[:_LEGEND]
    )
    return f'<img class="mask" src="{overlay}" alt="">', f'<p class="legend">{chips}</p>'


def _captions(sample: RawSample, facts: Mapping[str, Any], text: Sequence[Field], faults: list[str]) -> str:
    lines = []
    for field in text:
        try:
            texts = field.texts(sample)
        except SampleError as error:
            faults.append(str(error))
            continue
        # the json says the language of `txt`; a mapping says its own
        lines += [(key or (language(facts) if field.member == "txt" else ""), value) for key, value in texts]
    return "".join(_caption(name, value) for name, value in dict.fromkeys(lines))


def _caption(name: str, value: str) -> str:
    tag = f'<b class="language">{escape(name)}</b> ' if name else ""
    spoken = f' lang="{escape(name)}"' if name else ""
    return f'<p>{tag}<span dir="auto"{spoken}>{escape(value)}</span></p>'
