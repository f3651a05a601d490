"""English captions."""

from data_tools.make_tiny.languages.grammar import Relation, Size, join_with_commas

NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"cross": "crosses"}
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


class English:
    """No agreement but number; no colour or size begins with a vowel, so the article is always "a"."""

    def group(self, count: int, color: str, shape: str, size: Size | None = None) -> str:
        if count > 1:
            return f"{NUMBERS[count]} {color} {PLURALS.get(shape, shape + 's')}"
        return f"a {size} {color} {shape}" if size else f"a {color} {shape}"

    def shape_alone(self, shape: str) -> str:
        return f"{'an' if shape[0] in 'aeiou' else 'a'} {shape}"

    def join(self, phrases: list[str]) -> str:
        return join_with_commas(phrases, "and")

    def on_background(self, phrase: str, background: str) -> str:
        return f"{phrase} on a {background} background"

    def relate(self, first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> str:
        return f"{self.group(1, *first)} {RELATIONS[relation]} {self.group(1, *second)}"
