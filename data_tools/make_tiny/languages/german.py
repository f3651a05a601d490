"""German captions: three genders, strong and mixed adjective endings, dative after a preposition."""

from data_tools.make_tiny.languages.grammar import Relation, Size, join_with_commas

NUMBERS = {2: "zwei", 3: "drei", 4: "vier"}
# "-farben" because rosa and türkis do not take endings
COLORS = {
    "red": "rot", "yellow": "gelb", "green": "grün", "turquoise": "türkisfarben", "blue": "blau",
    "purple": "violett", "pink": "rosafarben", "brown": "braun",
}  # fmt: skip
# gender, nominative, dative, plural
SHAPES = {
    "circle": ("m", "Kreis", "Kreis", "Kreise"),
    "square": ("n", "Quadrat", "Quadrat", "Quadrate"),
    "triangle": ("n", "Dreieck", "Dreieck", "Dreiecke"),
    "star": ("m", "Stern", "Stern", "Sterne"),
    "heart": ("n", "Herz", "Herzen", "Herzen"),
    "ring": ("m", "Ring", "Ring", "Ringe"),
    "cross": ("n", "Kreuz", "Kreuz", "Kreuze"),
    "diamond": ("f", "Raute", "Raute", "Rauten"),
    "crescent": ("f", "Mondsichel", "Mondsichel", "Mondsicheln"),
    "arrow": ("m", "Pfeil", "Pfeil", "Pfeile"),
}
SIZES = {"large": "groß", "small": "klein"}
BACKGROUNDS = {"white": "weißem", "grey": "grauem", "beige": "beigem"}
RELATIONS = {"left": "links von", "right": "rechts von", "above": "oberhalb von", "below": "unterhalb von"}
ARTICLE = {"m": "ein", "f": "eine", "n": "ein"}
ENDING = {"m": "er", "f": "e", "n": "es"}
DATIVE_ARTICLE = {"m": "einem", "f": "einer", "n": "einem"}


class German:
    """Agreement in gender, number and case."""

    def group(self, count: int, color: str, shape: str, size: Size | None = None) -> str:
        gender, nominative, _, plural = SHAPES[shape]
        if count > 1:
            return f"{NUMBERS[count]} {COLORS[color]}e {plural}"
        stems = [SIZES[size]] if size else []
        adjectives = " ".join(stem + ENDING[gender] for stem in [*stems, COLORS[color]])
        return f"{ARTICLE[gender]} {adjectives} {nominative}"

    def shape_alone(self, shape: str) -> str:
        gender, nominative, _, _ = SHAPES[shape]
        return f"{ARTICLE[gender]} {nominative}"

    def join(self, phrases: list[str]) -> str:
        return join_with_commas(phrases, "und")

    def on_background(self, phrase: str, background: str) -> str:
        return f"{phrase} auf {BACKGROUNDS[background]} Hintergrund"

    def relate(self, first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> str:
        color, shape = second
        gender, _, dative, _ = SHAPES[shape]
        there = f"{DATIVE_ARTICLE[gender]} {COLORS[color]}en {dative}"
        return f"{self.group(1, *first)} {RELATIONS[relation]} {there}"
