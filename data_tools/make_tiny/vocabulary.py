"""What a scene can contain, and which colour-shape pairs are kept out of training."""

# All dark on BACKGROUNDS that are all light: a small tower then learns shapes several times sooner than from bright
# objects on dark ground among others (benchmarks/NOTES.md).
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "yellow": (214, 160, 0),
    "green": (30, 145, 50),
    "turquoise": (0, 140, 140),
    "blue": (30, 75, 225),
    "purple": (125, 40, 170),
    "pink": (225, 70, 150),
    "brown": (130, 78, 38),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond", "crescent", "arrow")

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (205, 207, 212),
    "beige": (240, 230, 210),
}

PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
CLASS_NAMES = tuple(f"{color} {shape}" for color, shape in PAIRS)
CLASS_INDEX = {name: index for index, name in enumerate(CLASS_NAMES)}

# Diagonals: one pair in six, and no colour and no shape loses more than two.
HELD_OUT = tuple(
    (color, shape)
    for row, color in enumerate(COLORS)
    for column, shape in enumerate(SHAPES)
    if (column - row) % 6 == 0
)
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

# The wordings of the English training captions of one object, with CLIP_benchmark's placeholder.
TEMPLATES = ("a {c}", "a large {c}", "a small {c}")
