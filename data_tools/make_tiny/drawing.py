"""Draw a planned scene: the image, its class map, and the box each object really covers."""

import math
from collections.abc import Callable
from functools import cache
from random import Random

from PIL import Image, ImageDraw

from data_tools.make_tiny.scenes import Scene, Thing
from data_tools.make_tiny.vocabulary import BACKGROUNDS, CLASS_INDEX, COLORS

OVERSAMPLING = 4  # outlines are drawn this much larger and averaged down: antialiasing
Point = tuple[float, float]
Box = tuple[int, int, int, int]


def draw_scene(scene: Scene) -> tuple[Image.Image, Image.Image, list[Box]]:
    """Return the RGB image, the class map and the pixel box of every object.

    The map has 8 bits a pixel: 0 is background, else the class + 1. A box is left, top, right, bottom
    (the last two exclusive) of the object's pixels in the map.
    """
    image = _draw_background(scene)
    class_map = Image.new("L", (scene.width, scene.height), 0)
    boxes = []
    for thing in scene.things:
        stencil = _draw_stencil(thing)  # coverage, 0..255
        color = tuple(max(0, min(255, a + b)) for a, b in zip(COLORS[thing.color], thing.tint, strict=True))
        image.paste(color, (thing.left, thing.top), stencil)
        inside = stencil.point(_half_covered())
        class_map.paste(CLASS_INDEX[f"{thing.color} {thing.shape}"] + 1, (thing.left, thing.top), inside)
        left, top, right, bottom = inside.getbbox() or (0, 0, 0, 0)
        boxes.append((thing.left + left, thing.top + top, thing.left + right, thing.top + bottom))
    return image, class_map, boxes


@cache
def _half_covered() -> list[int]:
    return [255 if coverage >= 128 else 0 for coverage in range(256)]


def _draw_background(scene: Scene) -> Image.Image:
    size = (scene.width, scene.height)
    random = Random(scene.texture_seed)
    base = BACKGROUNDS[scene.background]
    step = random.randint(7, 16)
    tone = tuple(channel - step for channel in base)
    if scene.texture == "gradient":
        ramp = Image.linear_gradient("L").resize(size)
        return Image.composite(Image.new("RGB", size, tone), Image.new("RGB", size, base), ramp)
    image = Image.new("RGB", size, base)
    draw = ImageDraw.Draw(image)
    pitch = random.randint(8, 20)
    if scene.texture == "stripes":
        slope = random.choice((-1, 0, 1)) * scene.height
        for x in range(-scene.height, scene.width + scene.height, pitch):
            draw.line([(x, 0), (x + slope, scene.height)], fill=tone, width=pitch // 2)
    elif scene.texture == "dots":
        for x in range(pitch // 2, scene.width, pitch):
            for y in range(pitch // 2, scene.height, pitch):
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=tone)
    return image


def _draw_stencil(thing: Thing) -> Image.Image:
    """How much of each pixel of its square the object covers, 0..255."""
    side = thing.extent * OVERSAMPLING
    stencil = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(stencil)
    if thing.shape in ROUND:
        ROUND[thing.shape](draw, side, math.radians(thing.turn))
    else:
        points = _fit(_turn(OUTLINES[thing.shape], math.radians(thing.turn)))
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in points], fill=255)
    return stencil.reduce(OVERSAMPLING)


def _turn(points: list[Point], angle: float) -> list[Point]:
    sine, cosine = math.sin(angle), math.cos(angle)
    return [(x * cosine - y * sine, x * sine + y * cosine) for x, y in points]


def _fit(points: list[Point]) -> list[Point]:
    """Scale and move the outline so that its longer side spans 0..1 and the shorter is centred."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    scale = 1 / max(width, height)
    left, top = (1 - width * scale) / 2, (1 - height * scale) / 2
    return [((x - min(xs)) * scale + left, (y - min(ys)) * scale + top) for x, y in points]


def _draw_circle(draw: ImageDraw.ImageDraw, side: int, angle: float) -> None:  # noqa: ARG001
    draw.ellipse([0, 0, side - 1, side - 1], fill=255)


def _draw_ring(draw: ImageDraw.ImageDraw, side: int, angle: float) -> None:  # noqa: ARG001
    hole = side * 0.26
    draw.ellipse([0, 0, side - 1, side - 1], fill=255)
    draw.ellipse([hole, hole, side - 1 - hole, side - 1 - hole], fill=0)


def _draw_crescent(draw: ImageDraw.ImageDraw, side: int, angle: float) -> None:
    x, y = side * 0.38 * math.cos(angle), side * 0.38 * math.sin(angle)
    inset = side * 0.06
    draw.ellipse([0, 0, side - 1, side - 1], fill=255)
    draw.ellipse([inset + x, inset + y, side - 1 - inset + x, side - 1 - inset + y], fill=0)


def _star() -> list[Point]:
    corners = []
    for corner in range(10):
        radius = 1.0 if corner % 2 == 0 else 0.42
        angle = math.pi * (corner / 5 - 0.5)
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _heart() -> list[Point]:
    curve = []
    for index in range(40):
        t = 2 * math.pi * index / 40
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((16 * math.sin(t) ** 3, -y))
    return curve


def _cross() -> list[Point]:
    arm, half = 1.0, 0.34
    return [
        (-half, -arm), (half, -arm), (half, -half), (arm, -half), (arm, half), (half, half),
        (half, arm), (-half, arm), (-half, half), (-arm, half), (-arm, -half), (-half, -half),
    ]  # fmt: skip


ROUND: dict[str, Callable[[ImageDraw.ImageDraw, int, float], None]] = {
    "circle": _draw_circle,
    "ring": _draw_ring,
    "crescent": _draw_crescent,
}
OUTLINES: dict[str, list[Point]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1.1, 0.9), (-1.1, 0.9)],
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
    "diamond": [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)],
    "arrow": [(-1, -0.22), (0.15, -0.22), (0.15, -0.62), (1, 0), (0.15, 0.62), (0.15, 0.22), (-1, 0.22)],
}
