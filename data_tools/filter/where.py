"""Rules of the form FIELD OP VALUE, such as `json:width >= 256` or `json:names.de ~ ^rot`."""

import json
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import UserError

_FORM = re.compile(
    r"\s*(?P<field>[^\s=!<>~]+)(?:\s*(?P<sign>==|!=|<=|>=|<|>|!~|~)|\s+(?P<word>in)\s)\s*(?P<value>.+)",
    re.DOTALL,
)
_SEARCHES = ("~", "!~")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_EXAMPLES = "json:width >= 256, txt !~ (?i)wallpaper, json:lang in en,de"


class Where(NamedTuple):
    """A rule about one field. `test` is asked about every value there; one that passes is enough.

    negated: then none may pass.
    """

    text: str
    field: Field
    test: Callable[[Any], bool]
    negated: bool = False

    @classmethod
    def parse(cls, text: str) -> "Where":
        """Read FIELD OP VALUE; OP is one of == != < <= > >= ~ !~ in. Raises `UserError`."""
        match = _FORM.fullmatch(text)
        name, value = (match["sign"] or match["word"], match["value"].strip()) if match else ("", "")
        # `>> 3` is a slip, not a comparison with "> 3"; a regular expression may begin as it likes
        if match is None or (name not in _SEARCHES and value.startswith(tuple("=!<>~"))):
            raise UserError(f"cannot read the rule {text!r}; write FIELD OP VALUE, for example {_EXAMPLES}")
        return cls(text, Field.parse(match["field"]), _test(name, value, text), name.startswith("!"))

    def holds(self, sample: RawSample) -> bool:
        """Is it true of a sample? Of a field that is absent only `!=` and `!~` are. Raises `SampleError`."""
        return any(self.test(value) for _, value in self.field.values(sample)) != self.negated


def compile_pattern(pattern: str, where: str, flags: int = 0) -> re.Pattern[str]:
    """A regular expression of the user's, who wrote it in `where`. Raises `UserError`."""
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from error


def _test(name: str, value: str, rule: str) -> Callable[[Any], bool]:
    if name in _SEARCHES:
        pattern = compile_pattern(value, f"rule {rule!r}")
        return lambda found: pattern.search(_text(found)) is not None
    if name == "in":
        wanted = [_literal(part.strip()) for part in value.strip("[]()").split(",")]
        return lambda found: any(_same(found, each) for each in wanted)
    literal = _literal(value)
    if name in _COMPARE:
        compare = _COMPARE[name]
        return lambda found: _ordered(compare, found, literal)
    return lambda found: _same(found, literal)


def _literal(text: str) -> Any:
    """A number, true, false or null as in JSON; anything else is text, with or without quotes."""
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip("'")
    return text if isinstance(value, list | dict) else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: Any) -> float | None:
    """Numbers in text count too: tables are often packed as texts."""
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, int | float) and not isinstance(wanted, bool):
        return _number(found) == wanted
    return _text(found) == _text(wanted)


def _ordered(compare: Callable[[Any, Any], bool], found: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return isinstance(found, str) and compare(found, wanted)
    number = _number(found)
    return number is not None and compare(number, wanted)
