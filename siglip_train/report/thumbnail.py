"""Small images as data URLs, so that a page can show what a model saw without a second file."""

import base64
import io
from typing import Literal

from PIL import Image


def thumbnail(image: Image.Image, side: int = 96) -> str:
    """Give `image`, scaled to fit a square of `side` pixels, as a JPEG data URL of a few kB."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    if max(small.size) < side // 2:
        # pixel art such as 32 x 32 photographs: enlarged here, since browsers blur
        factor = side // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    return data_url(small)


def data_url(image: Image.Image, kind: Literal["JPEG", "PNG"] = "JPEG") -> str:
    """Give `image` as the address of itself."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80, optimize=kind == "PNG")
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def spread(length: int, count: int) -> list[int]:
    """Give at most `count` positions spread evenly over 0..length-1."""
    count = min(length, count)
    return [position * length // count for position in range(count)]
