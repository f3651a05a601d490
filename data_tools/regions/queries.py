"""What a detector is asked for in an image: the word n-grams of its captions.

As OWL-ST does (Minderer et al. 2023, section 3.1), there is no grammar: all n-grams count, but those of stop words and
generic words alone.
"""

import unicodedata
from collections.abc import Iterable

from data_tools.regions.words import GENERIC, NOT_NOUNS, STOP

# the seven prompts that CLIP's authors found to be the best of their 80, which OWL-ViT takes too
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def n_grams(
    captions: Iterable[str],
    longest: int = 10,
    most_words: int = 64,
    more_stop_words: frozenset[str] = frozenset(),
) -> list[str]:
    """All n-grams of up to `longest` words, short ones first, each once whatever its case.

    most_words: what follows in a caption is left out, since of a page of text there would be thousands.
    more_stop_words: in lower case, beside the English ones.
    """
    weak = STOP | GENERIC | more_stop_words
    found: dict[str, tuple[int, str]] = {}
    for caption in captions:
        words = words_of(caption)[:most_words]
        says = [_has_letter(word) and word.lower() not in weak for word in words]
        for count in range(1, min(longest, len(words)) + 1):
            for start in range(len(words) - count + 1):
                if any(says[start : start + count]):
                    text = " ".join(words[start : start + count])
                    found.setdefault(text.lower(), (count, text))
    return [text for _, text in sorted(found.values(), key=lambda each: each[0])]


def words_of(caption: str) -> list[str]:
    """What stands between spaces, without the punctuation at its ends."""
    return [word for each in caption.split() if (word := _bare(each))]


def names_a_thing(captions: Iterable[str], more_stop_words: frozenset[str] = frozenset()) -> bool:
    """Has a caption a word that may be a noun?

    No tagger says so, which would cost more than it saves and speak one language: a word of two letters or more counts
    unless it is in a list of stop words, generic words, or common adjectives and verbs, or ends in -ly.
    """
    weak = STOP | GENERIC | NOT_NOUNS | more_stop_words
    for word in (word.lower() for caption in captions for word in words_of(caption)):
        if sum(map(str.isalpha, word)) >= 2 and word not in weak and not word.endswith("ly"):
            return True
    return False


def _bare(word: str) -> str:
    inside = [place for place, letter in enumerate(word) if _is_of_words(letter)]
    return word[inside[0] : inside[-1] + 1] if inside else ""


def _is_of_words(letter: str) -> bool:
    # vowel signs of Hindi and others are marks
    return letter.isalnum() or unicodedata.category(letter).startswith("M")


def _has_letter(word: str) -> bool:
    return any(map(str.isalpha, word))
