"""The rules that one sample passes or fails by itself, each a line in the table of what was dropped."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from data_tools.filter.where import Where, compile_pattern
from data_tools.shared.reading import first_text, image_header
from data_tools.stats.texts import words
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import SampleError, UserError
from siglip_train.files.atomic import read_text

UNKNOWN = "unknown"


@dataclass(frozen=True)
class RuleOptions:
    """The rules as they stand on the command line; image, text, language: where these are, as in data.sources."""

    where: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    min_side: int | None = None
    max_aspect: float | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    min_words: int | None = None
    drop_text: tuple[str, ...] = ()
    keep_list: str | None = None
    drop_list: str | None = None
    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "bmp")
    text: tuple[str, ...] = ("txt",)
    language: tuple[str, ...] = ("json:language", "json:lang")


class Looked:
    """A sample, and what rules ask of it, read when the first asks. All raise `SampleError`."""

    def __init__(self, sample: RawSample, fields: "Fields") -> None:
        self.sample, self._fields = sample, fields

    @functools.cached_property
    def captions(self) -> list[str]:
        """Those of all text fields, without the space around them."""
        return [text.strip() for field in self._fields.text for _, text in field.texts(self.sample)]

    @functools.cached_property
    def language(self) -> str:
        """Where the sample says so, else "unknown"."""
        return first_text(self._fields.language, self.sample) or UNKNOWN

    @property
    def image_bytes(self) -> bytes:
        """The bytes of the image."""
        members = self.sample.members
        name = next((name for name in self._fields.image if name in members), None)
        if name is None:
            raise SampleError("no image", f"only {', '.join(members)}")
        return members[name]

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) by the header of the image."""
        return image_header(self.image_bytes)[1:]


class Fields:
    """Where images, captions and languages are. Raises `UserError`."""

    def __init__(self, options: RuleOptions) -> None:
        self.image = options.image
        self.text = [Field.parse(text) for text in options.text]
        self.language = [Field.parse(text) for text in options.language]


class Rule:
    """One rule. name: as it is counted. holds: is it true of a sample?"""

    def __init__(self, name: str, holds: Callable[[Looked], bool]) -> None:
        self.name, self.holds = name, holds


def build_rules(options: RuleOptions) -> list[Rule]:
    """The rules in the order in which they are counted. Raises `UserError`."""
    return [
        *_list_rules(options),
        *_language_rules(options),
        *[Rule(f"where {text}", _where(Where.parse(text))) for text in options.where],
        *_size_rules(options),
        *_text_rules(options),
    ]


def _where(rule: Where) -> Callable[[Looked], bool]:
    return lambda looked: rule.holds(looked.sample)


def _list_rules(options: RuleOptions) -> list[Rule]:
    rules = []
    if options.keep_list is not None:
        kept = read_list(options.keep_list)
        rules.append(Rule(f"keep-list of {len(kept):,}", lambda looked: is_listed(looked.sample, kept)))
    if options.drop_list is not None:
        dropped = read_list(options.drop_list)
        rules.append(
            Rule(f"drop-list of {len(dropped):,}", lambda looked: not is_listed(looked.sample, dropped))
        )
    return rules


def read_list(path: str) -> frozenset[str]:
    """The lines of a file of keys. Raises `UserError`."""
    lines = read_text(path).splitlines()
    keys = frozenset(line.strip() for line in lines) - {""}
    if not keys:
        raise UserError(f"the list {path} is empty: it needs `key` or `shard/key`, one a line")
    return keys


def is_listed(sample: RawSample, keys: frozenset[str]) -> bool:
    """Does the list name the sample, by its key alone or with its shard?"""
    return sample.key in keys or sample.name in keys


def _language_rules(options: RuleOptions) -> list[Rule]:
    wanted = frozenset(options.languages)
    return [Rule("languages", lambda looked: looked.language in wanted)] if wanted else []


def _size_rules(options: RuleOptions) -> list[Rule]:
    rules = []
    if (side := options.min_side) is not None:
        rules.append(Rule("min-side", lambda looked: min(looked.size) >= side))
    if (aspect := options.max_aspect) is not None:
        rules.append(Rule("max-aspect", lambda looked: max(looked.size) <= aspect * min(looked.size)))
    return rules


def _text_rules(options: RuleOptions) -> list[Rule]:
    """Every caption must pass; a sample without one has none of the characters and words that are asked for."""
    rules = []
    if (least := options.min_chars) is not None:
        rules.append(Rule("min-chars", lambda looked: min(map(len, looked.captions), default=0) >= least))
    if (most := options.max_chars) is not None:
        rules.append(Rule("max-chars", lambda looked: max(map(len, looked.captions), default=0) <= most))
    if (number := options.min_words) is not None:
        rules.append(Rule("min-words", lambda looked: _fewest_words(looked.captions) >= number))
    rules += [
        Rule(f"drop-text {text}", _without(compile_pattern(text, "--drop-text")))
        for text in options.drop_text
    ]
    return rules


def _fewest_words(captions: list[str]) -> int:
    return min((len(words(caption)) for caption in captions), default=0)


def _without(pattern: re.Pattern[str]) -> Callable[[Looked], bool]:
    return lambda looked: not any(pattern.search(caption) for caption in looked.captions)
