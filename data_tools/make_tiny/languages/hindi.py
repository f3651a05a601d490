"""Hindi captions: every shape word is masculine; adjectives in -ā change in plural and oblique."""

from data_tools.make_tiny.languages.grammar import Relation, Size, join_with_commas

NUMBERS = {2: "दो", 3: "तीन", 4: "चार"}
# direct singular, and the form of the plural and the oblique
COLORS = {
    "red": ("लाल", "लाल"), "yellow": ("पीला", "पीले"), "green": ("हरा", "हरे"),
    "turquoise": ("फ़िरोज़ी", "फ़िरोज़ी"), "blue": ("नीला", "नीले"), "purple": ("बैंगनी", "बैंगनी"),
    "pink": ("गुलाबी", "गुलाबी"), "brown": ("भूरा", "भूरे"),
}  # fmt: skip
SHAPES = {
    "circle": ("वृत्त", "वृत्त"), "square": ("वर्ग", "वर्ग"), "triangle": ("त्रिभुज", "त्रिभुज"),
    "star": ("तारा", "तारे"), "heart": ("दिल", "दिल"), "ring": ("छल्ला", "छल्ले"), "cross": ("क्रॉस", "क्रॉस"),
    "diamond": ("समचतुर्भुज", "समचतुर्भुज"), "crescent": ("अर्धचंद्र", "अर्धचंद्र"), "arrow": ("तीर", "तीर"),
}  # fmt: skip
SIZES = {"large": "बड़ा", "small": "छोटा"}
BACKGROUNDS = {"white": "सफ़ेद", "grey": "स्लेटी", "beige": "बेज"}
RELATIONS = {"left": "के बाईं ओर", "right": "के दाईं ओर", "above": "के ऊपर", "below": "के नीचे"}


class Hindi:
    """Agreement in number and case; what is known (place, background) comes first."""

    def group(self, count: int, color: str, shape: str, size: Size | None = None) -> str:
        if count > 1:
            return f"{NUMBERS[count]} {COLORS[color][1]} {SHAPES[shape][1]}"
        phrase = f"{COLORS[color][0]} {SHAPES[shape][0]}"
        return f"एक {SIZES[size]} {phrase}" if size else f"एक {phrase}"

    def shape_alone(self, shape: str) -> str:
        return f"एक {SHAPES[shape][0]}"

    def join(self, phrases: list[str]) -> str:
        return join_with_commas(phrases, "और")

    def on_background(self, phrase: str, background: str) -> str:
        return f"{BACKGROUNDS[background]} पृष्ठभूमि पर {phrase}"

    def relate(self, first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> str:
        color, shape = second
        return f"एक {COLORS[color][1]} {SHAPES[shape][1]} {RELATIONS[relation]} {self.group(1, *first)}"
