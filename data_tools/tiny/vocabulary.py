"""What a scene can contain, and which colour-shape pairs are kept out of training."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "yellow": (246, 208, 0),
    "green": (30, 145, 50),
    "turquoise": (0, 200, 195),
    "blue": (30, 75, 225),
    "purple": (125, 40, 170),
    "pink": (250, 125, 185),
    "brown": (130, 78, 38),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond", "crescent", "arrow")

# no object colour is near any of these
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "grey": (160, 160, 162),
    "black": (22, 22, 24),
    "beige": (232, 220, 200),
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
