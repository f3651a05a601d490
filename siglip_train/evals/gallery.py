"""Small pictures as data URLs, so that a report can show what a model saw without a second file."""

import base64
import io

from PIL import Image


def thumbnail(picture: Image.Image, side: int = 96) -> str:
    """Give `picture`, scaled to fit a square of `side` pixels, as a JPEG data URL of about 2 kB."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    if max(small.size) < side // 2:
        # pixel art such as 32 x 32 photographs: enlarged here, since browsers blur
        factor = side // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def spread(length: int, count: int) -> list[int]:
    """Give at most `count` positions spread evenly over 0..length-1."""
    count = min(length, count)
    return [position * length // count for position in range(count)]
