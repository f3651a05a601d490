"""Plan scenes: which shapes, where, on what, and which true thing the caption will say about them."""

from dataclasses import dataclass
from random import Random

from data_tools.make_tiny.captions import Description, Group
from data_tools.make_tiny.languages import Relation, Size
from data_tools.make_tiny.vocabulary import BACKGROUNDS, SEEN

SHORT_SIDE = (64, 120)  # pixels
LONGEST_SIDE = 160
GAP = 2  # pixels between two objects at least
# of the shorter side; the gaps between the ranges keep "large" and "small" beyond dispute
SINGLE_EXTENT: dict[Size | None, tuple[float, float]] = {
    "small": (0.50, 0.56), None: (0.66, 0.76), "large": (0.86, 0.96),
}  # fmt: skip
SEVERAL_EXTENT = (0.28, 0.42)
TEXTURES = ("flat", "flat", "gradient", "stripes", "dots")


@dataclass(frozen=True)
class Thing:
    """One object: `left`, `top`, `extent` are the square it fits in, in pixels; `turn` in degrees."""

    color: str
    shape: str
    left: int
    top: int
    extent: int
    turn: float
    tint: tuple[int, int, int]  # added to the named colour

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.extent / 2, self.top + self.extent / 2


@dataclass(frozen=True)
class Scene:
    """Everything needed to draw an image and to caption it."""

    width: int
    height: int
    background: str
    texture: str
    texture_seed: int
    things: tuple[Thing, ...]
    description: Description


def plan_scene(random: Random) -> Scene:
    """A scene of one to four objects of the pairs seen in training."""
    draw = random.random()
    if draw < 0.70:
        return plan_single(random, random.choice(SEEN))
    counts: tuple[int, ...]
    if draw < 0.78:
        counts = (random.randint(2, 4),)
    elif draw < 0.92:
        counts = (1, 1)
    else:
        counts = random.choice(
            ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1))
        )
    pairs = random.sample(SEEN, len(counts))
    groups = tuple(Group(count, *pair) for count, pair in zip(counts, pairs, strict=True))
    return _plan_several(random, groups)


def plan_single(random: Random, pair: tuple[str, str]) -> Scene:
    """A scene of one object of the given (color, shape)."""
    color, shape = pair
    width, height = _plan_canvas(random)
    background = random.choice(tuple(BACKGROUNDS))
    size: Size | None = random.choice(("large", "small", None))
    low, high = SINGLE_EXTENT[size]
    extent = round(min(width, height) * random.uniform(low, high))
    thing = Thing(
        color=color,
        shape=shape,
        left=random.randint(1, width - extent - 1),
        top=random.randint(1, height - extent - 1),
        extent=extent,
        turn=_plan_turn(random),
        tint=_plan_tint(random),
    )
    # half of the captions of a large or small object say so; a third of the rest name the background
    said_size = size if random.random() < 0.5 else None
    said_background = background if said_size is None and random.random() < 0.33 else None
    description = Description((Group(1, color, shape),), said_size, said_background)
    texture, texture_seed = random.choice(TEXTURES), random.getrandbits(32)
    return Scene(width, height, background, texture, texture_seed, (thing,), description)


def plan_referring(random: Random, pairs: tuple[tuple[str, str], ...]) -> Scene:
    """A scene of two to four objects, no two alike, the first of the given pairs, others of all that training shows.

    So that the name of any object means one box, and a constant box is seldom right.
    """
    first = random.choice(pairs)
    others = random.sample([pair for pair in SEEN if pair != first], random.randint(1, 3))
    return _plan_several(random, tuple(Group(1, *pair) for pair in (first, *others)))


def _plan_several(random: Random, groups: tuple[Group, ...]) -> Scene:
    width, height = _plan_canvas(random)
    background = random.choice(tuple(BACKGROUNDS))
    pairs = [(group.color, group.shape) for group in groups for _ in range(group.count)]
    things = _place(random, (width, height), pairs)
    description = Description(groups)
    if len(things) == len(groups) == 2:
        description = Description(groups, relation=relation_of(*things) if random.random() < 0.6 else None)
    elif len(groups) == 1 and random.random() < 0.33:
        description = Description(groups, background=background)
    texture, texture_seed = random.choice(TEXTURES), random.getrandbits(32)
    return Scene(width, height, background, texture, texture_seed, things, description)


def _plan_canvas(random: Random) -> tuple[int, int]:
    short = random.randint(*SHORT_SIDE)
    long = min(LONGEST_SIDE, round(short * random.uniform(1.0, 1.5)))
    return (short, long) if random.random() < 0.4 else (long, short)


def _plan_turn(random: Random) -> float:
    # more would make a diamond of a square and an x of a cross
    return random.uniform(-12, 12)


def _plan_tint(random: Random) -> tuple[int, int, int]:
    return random.randint(-12, 12), random.randint(-12, 12), random.randint(-12, 12)


def _place(random: Random, canvas: tuple[int, int], pairs: list[tuple[str, str]]) -> tuple[Thing, ...]:
    """Put the objects into squares that do not touch; when one does not fit, start again a little smaller."""
    width, height = canvas
    shrink = 1.0
    while True:
        things: list[Thing] = []
        for color, shape in pairs:
            extent = round(min(canvas) * random.uniform(*SEVERAL_EXTENT) * shrink)
            for _ in range(20):
                left, top = random.randint(1, width - extent - 1), random.randint(1, height - extent - 1)
                if all(_is_apart(left, top, extent, other) for other in things):
                    turn, tint = _plan_turn(random), _plan_tint(random)
                    things.append(Thing(color, shape, left, top, extent, turn, tint))
                    break
        if len(things) == len(pairs):
            return tuple(things)
        shrink *= 0.95


def _is_apart(left: int, top: int, extent: int, other: Thing) -> bool:
    return (
        left + extent + GAP <= other.left
        or other.left + other.extent + GAP <= left
        or top + extent + GAP <= other.top
        or other.top + other.extent + GAP <= top
    )


def relation_of(first: Thing, second: Thing) -> Relation | None:
    """Where the first is, seen from the second; None where a person would hesitate (on a diagonal)."""
    right = first.center[0] - second.center[0]
    down = first.center[1] - second.center[1]
    reach = (first.extent + second.extent) / 2
    if abs(right) >= max(reach, 1.3 * abs(down)):
        return "right" if right > 0 else "left"
    if abs(down) >= max(reach, 1.3 * abs(right)):
        return "below" if down > 0 else "above"
    return None
