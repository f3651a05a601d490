"""A contact sheet of samples with their captions, so that a person can see what is trained on."""

import io
import json
import tarfile
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 6, 4
CELL, LINE, LINES, MARGIN = 168, 15, 4, 8


def write_preview(shard: Path, path: Path) -> None:
    """Draw the first samples of a shard on one sheet with the English captions.

    English alone, because the font that comes with Pillow has no other script.
    """
    height = CELL + LINES * LINE + MARGIN
    sheet = Image.new("RGB", (COLUMNS * (CELL + MARGIN) + MARGIN, ROWS * height + MARGIN), (225, 228, 232))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for cell, (image, caption) in enumerate(_read_samples(shard, COLUMNS * ROWS)):
        left = MARGIN + cell % COLUMNS * (CELL + MARGIN)
        top = MARGIN + cell // COLUMNS * height
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        for row, line in enumerate(textwrap.wrap(caption, 27)[:LINES]):
            draw.text((left, top + CELL + row * LINE), line, fill=(20, 20, 20), font=font)
    sheet.save(path)


def _read_samples(shard: Path, count: int) -> list[tuple[Image.Image, str]]:
    images: dict[str, Image.Image] = {}
    captions: dict[str, str] = {}
    with tarfile.open(shard) as archive:
        for entry in archive:
            key, extension = entry.name.split(".", 1)
            source = archive.extractfile(entry)
            if source is None or len(captions) == count:
                break
            if extension in ("jpg", "png", "webp"):
                images[key] = Image.open(io.BytesIO(source.read())).convert("RGB")
            elif extension == "json":
                captions[key] = json.load(source)["captions"]["en"]
    return [(images[key], caption) for key, caption in captions.items()]
