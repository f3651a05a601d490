"""What every language provides, so that captions.py can word one description in all of them."""

from typing import Literal, Protocol

Size = Literal["large", "small"]
Relation = Literal["left", "right", "above", "below"]


class Grammar(Protocol):
    """Words and agreement rules of one language."""

    def group(self, count: int, color: str, shape: str, size: Size | None = None) -> str:
        """`count` (1 to 4) equal shapes; `size` only with one shape."""
        ...

    def shape_alone(self, shape: str) -> str:
        """One shape without its colour."""
        ...

    def join(self, phrases: list[str]) -> str:
        """The phrases as one list."""
        ...

    def on_background(self, phrase: str, background: str) -> str:
        """The phrase with the colour of the background."""
        ...

    def relate(self, first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> str:
        """Where the first (color, shape) is, seen from the second; one of each."""
        ...


def join_with_commas(phrases: list[str], conjunction: str) -> str:
    """`a, b and c`: European lists without a comma before the conjunction."""
    *head, last = phrases
    return f"{', '.join(head)} {conjunction} {last}" if head else last
