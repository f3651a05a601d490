"""Word a description of a scene in any language; the description is decided once, so all languages agree."""

from dataclasses import dataclass

from data_tools.make_tiny.languages import LANGUAGES, Relation, Size


@dataclass(frozen=True)
class Group:
    """`count` objects of one colour and shape."""

    count: int
    color: str
    shape: str


@dataclass(frozen=True)
class Description:
    """What a caption says: every object of the scene, and at most one of size, background and relation.

    shape_alone: of the only object nothing but its shape.
    """

    groups: tuple[Group, ...]
    size: Size | None = None  # of the only object
    background: str | None = None
    relation: Relation | None = None  # of the first of two objects, seen from the second
    shape_alone: bool = False


def word(description: Description, language: str) -> str:
    """The caption of a description in one language."""
    grammar = LANGUAGES[language]
    groups = description.groups
    if description.shape_alone:
        return grammar.shape_alone(groups[0].shape)
    if description.relation is not None:
        first, second = groups
        return grammar.relate((first.color, first.shape), description.relation, (second.color, second.shape))
    phrase = grammar.join(
        [grammar.group(group.count, group.color, group.shape, description.size) for group in groups]
    )
    return grammar.on_background(phrase, description.background) if description.background else phrase


def word_everywhere(description: Description) -> dict[str, str]:
    """The caption of a description in every language."""
    return {language: word(description, language) for language in LANGUAGES}
