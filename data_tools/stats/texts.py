"""Captions as words, for counts of words and to find captions that differ in nothing that matters."""

import string
import unicodedata

_AROUND_WORDS = string.punctuation + "«»„“”‚‘’‹›…–—·。、，；：！？（）「」『』【】《》।؟،؛¿¡"


def words(text: str) -> list[str]:
    """Case-folded words without punctuation around them; a language without spaces gives whole phrases."""
    # the composed form, so that one letter is never two texts; folded widths, as of full-width digits
    folded = unicodedata.normalize("NFKC", text).casefold()
    return [word for part in folded.split() if (word := part.strip(_AROUND_WORDS))]


def normalised(text: str) -> str:
    """The words, joined: what two captions share that differ in case, spaces and punctuation alone."""
    return " ".join(words(text)) or text.strip()


def encodable(text: str) -> str:
    """The text with "?" for what no encoding has, such as half of a surrogate pair in a json member."""
    return text.encode("utf-8", "replace").decode("utf-8")
