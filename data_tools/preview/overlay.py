"""What is drawn over a picture: boxes as SVG, a class map as a translucent PNG, both in the colours of the legend."""

import base64
import colorsys
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from data_tools.facts import Box, are_corners

# steps of the golden ratio round the colour circle: neighbours in number are far apart in hue
_GOLDEN = 0.618034


def colour(number: int) -> tuple[int, int, int]:
    """A strong colour for a class or label; the same number gives the same colour."""
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1.0, 0.75, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def css(rgb: tuple[int, int, int]) -> str:
    """`#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def data_url(image: Image.Image, kind: str) -> str:
    """A picture inside the page; kind: JPEG or PNG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def draw_boxes(boxes: Sequence[Box], width: int, height: int) -> str:
    """An SVG that lies over a picture of that size; boxes outside it are left out. "" = none to draw."""
    labels = sorted({box.label for box in boxes})
    # labels stay as large on the page whatever the picture's pixels
    font = max(width, height) * 0.045
    shapes = []
    for box in boxes:
        if not are_corners(box.corners):
            continue
        x0, y0, x1, y1 = (value * side for value, side in zip(box.corners, (width, height) * 2, strict=True))
        ink = css(colour(labels.index(box.label)))
        shapes.append(
            f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" stroke="{ink}"/>'
            f'<text x="{x0 + font / 4:.1f}" y="{y0 + font:.1f}" font-size="{font:.1f}" fill="{ink}">'
            f"{escape(box.label)}</text>"
        )
    if not shapes:
        return ""
    return f'<svg class="boxes" viewBox="0 0 {width} {height}">{"".join(shapes)}</svg>'


def draw_mask(mask: Image.Image, width: int, height: int) -> str:
    """The class map as a data URL of a PNG of that size; class 0 is clear."""
    classes = mask.resize((width, height), Image.Resampling.NEAREST)
    # the numbers of a palette picture are kept, its colours are not
    coloured = Image.frombytes("P", classes.size, classes.tobytes())
    coloured.putpalette([value for number in range(256) for value in colour(number)])
    coloured.info["transparency"] = bytes([0, *[255] * 255])
    return data_url(coloured, "PNG")
