"""A small picture as a data URL, so that a page needs no second file."""

import base64
import io

from PIL import Image


def thumbnail(picture: Image.Image, side: int = 192) -> str:
    """Give an RGB picture, shrunk to fit a square of `side` pixels, as a JPEG data URL of a few kB."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
