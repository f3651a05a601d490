"""Russian captions: three genders, genitive after "слева от", instrumental after "над"."""

from data_tools.make_tiny.languages.grammar import Relation, Size, join_with_commas

NUMBERS = {2: ("два", "две"), 3: ("три", "три"), 4: ("четыре", "четыре")}
HARD_ENDINGS = {
    "m": "ый", "f": "ая", "n": "ое",
    "genitive m": "ого", "genitive f": "ой", "genitive n": "ого",
    "instrumental m": "ым", "instrumental f": "ой", "instrumental n": "ым",
    "plural": "ые", "genitive plural": "ых",
}  # fmt: skip
SOFT_ENDINGS = {
    "m": "ий", "f": "яя", "n": "ее",
    "genitive m": "его", "genitive f": "ей", "genitive n": "его",
    "instrumental m": "им", "instrumental f": "ей", "instrumental n": "им",
    "plural": "ие", "genitive plural": "их",
}  # fmt: skip
COLORS = {
    "red": ("красн", HARD_ENDINGS), "yellow": ("жёлт", HARD_ENDINGS), "green": ("зелён", HARD_ENDINGS),
    "turquoise": ("бирюзов", HARD_ENDINGS), "blue": ("син", SOFT_ENDINGS),
    "purple": ("фиолетов", HARD_ENDINGS), "pink": ("розов", HARD_ENDINGS),
    "brown": ("коричнев", HARD_ENDINGS),
}  # fmt: skip
# gender, nominative, genitive (also after 2 to 4), instrumental
SHAPES = {
    "circle": ("m", "круг", "круга", "кругом"),
    "square": ("m", "квадрат", "квадрата", "квадратом"),
    "triangle": ("m", "треугольник", "треугольника", "треугольником"),
    "star": ("f", "звезда", "звезды", "звездой"),
    "heart": ("n", "сердце", "сердца", "сердцем"),
    "ring": ("n", "кольцо", "кольца", "кольцом"),
    "cross": ("m", "крест", "креста", "крестом"),
    "diamond": ("m", "ромб", "ромба", "ромбом"),
    "crescent": ("m", "полумесяц", "полумесяца", "полумесяцем"),
    "arrow": ("f", "стрелка", "стрелки", "стрелкой"),
}
SIZES = {
    "large": {"m": "большой", "f": "большая", "n": "большое"},
    "small": {"m": "маленький", "f": "маленькая", "n": "маленькое"},
}
BACKGROUNDS = {"white": "белом", "grey": "сером", "beige": "бежевом"}
RELATIONS = {"left": "слева от", "right": "справа от", "above": "над", "below": "под"}


def _color(color: str, form: str) -> str:
    stem, endings = COLORS[color]
    return stem + endings[form]


class Russian:
    """Agreement in gender, number and case."""

    def group(self, count: int, color: str, shape: str, size: Size | None = None) -> str:
        gender, nominative, genitive, _ = SHAPES[shape]
        if count > 1:
            # after 2 to 4: nominative plural adjective with a feminine noun, genitive with the others
            adjective = _color(color, "plural" if gender == "f" else "genitive plural")
            return f"{NUMBERS[count][gender == 'f']} {adjective} {genitive}"
        phrase = f"{_color(color, gender)} {nominative}"
        return f"{SIZES[size][gender]} {phrase}" if size else phrase

    def shape_alone(self, shape: str) -> str:
        return SHAPES[shape][1]

    def join(self, phrases: list[str]) -> str:
        return join_with_commas(phrases, "и")

    def on_background(self, phrase: str, background: str) -> str:
        return f"{phrase} на {BACKGROUNDS[background]} фоне"

    def relate(self, first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> str:
        color, shape = second
        gender, _, genitive, instrumental = SHAPES[shape]
        if relation in ("above", "below"):
            there = f"{_color(color, f'instrumental {gender}')} {instrumental}"
        else:
            there = f"{_color(color, f'genitive {gender}')} {genitive}"
        return f"{self.group(1, *first)} {RELATIONS[relation]} {there}"
