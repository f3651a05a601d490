"""The languages of the captions and the share each has of the training samples."""

from data_tools.make_tiny.languages.arabic import Arabic
from data_tools.make_tiny.languages.chinese import Chinese
from data_tools.make_tiny.languages.english import English
from data_tools.make_tiny.languages.german import German
from data_tools.make_tiny.languages.grammar import Grammar, Relation, Size
from data_tools.make_tiny.languages.hindi import Hindi
from data_tools.make_tiny.languages.japanese import Japanese
from data_tools.make_tiny.languages.russian import Russian
from data_tools.make_tiny.languages.spanish import Spanish

__all__ = ["LANGUAGES", "SHARES", "Grammar", "Relation", "Size"]

LANGUAGES: dict[str, Grammar] = {
    "en": English(),
    "de": German(),
    "zh": Chinese(),
    "ar": Arabic(),
    "es": Spanish(),
    "ru": Russian(),
    "hi": Hindi(),
    "ja": Japanese(),
}
SHARES: dict[str, float] = {
    "en": 0.60, "de": 0.08, "zh": 0.08, "ar": 0.06, "es": 0.05, "ru": 0.05, "hi": 0.04, "ja": 0.04,
}  # fmt: skip
