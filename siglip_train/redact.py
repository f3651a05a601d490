"""Secrets in what people write for shards and commands: signatures and passwords of URLs, tokens of headers.

`redacted` is applied where text leaves the program: logs, messages, the files of a run, Weights & Biases. Programs
themselves keep working with what was written.
"""

import logging
import re
import sys
import threading
import traceback
from types import TracebackType
from typing import Any

HIDDEN = "***"

# every repetition before a secret is bounded: a long text by a stranger would take the square of its length
_URL = re.compile(r"(?i)\b[a-z][a-z0-9+.-]{0,20}://[^\s'\"<>]+")
_USER_INFO = re.compile(r"(://)[^\s/?#@]*(?:@[^\s/?#@]*)*@")
_PAIR = re.compile(r"([?&;#][^=&;#?]+=)[^&;#]*")
_BARE_QUERY = re.compile(r"\?[^=&;#{}]+$")
# what follows is a secret, whatever it looks like; \\? for quotes inside JSON
_QUOTED = r"""(?:\\?"[^"\n]*"|'[^'\n]*'|[^\s'"]\S*)"""
_SECRET = (
    r"passw(?:or)?ds?|passwd|passphrase|pwd|secrets?|credentials?|signature|sig"
    r"|(?:api|access|account|private|shared|auth|session|sas)[_-]?key(?:[_-]?id)?|bearer"
)
_RULES = (
    # curl -H "Name: value", wget --header=…: the name tells enough
    (
        re.compile(
            r"""(?i)((?:^|\s)(?:-H|--(?:proxy-)?header)[ =]?\\?)(["'])([\w-]{1,80}\s*:)(?:(?!\2).)*(\2?)"""
        ),
        rf"\1\2\3 {HIDDEN}\4",
    ),
    # a header by itself
    (
        re.compile(
            r"""(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|(?:[\w-]{1,40}-)?(?:token|api-?key))(\\?["']?\s*:\s*)"""
            r"""(\\?["']?)(?![\s*"'])[^"'\n]{6,}"""
        ),
        rf"\1\2\3{HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)(\s+|%20)(?=[^\s'\"]*[\d=._-])[^\s'\"]{8,}"), rf"\1\2{HIDDEN}"),
    # curl -u user:password, --password x, --token=x, sshpass -p x
    (
        re.compile(r"(?i)((?:^|\s)(?:-u|--user|--proxy-user)[ =]?\\?['\"]?)[^\s:'\"]{1,100}:[^\s'\"]+"),
        rf"\1{HIDDEN}",
    ),
    (re.compile(rf"(?i)(\bsshpass\s+-p\s*){_QUOTED}"), rf"\1{HIDDEN}"),
    (
        re.compile(rf"(?i)((?:^|\s)--?[\w-]{{0,40}}(?:{_SECRET}|token)[\w-]{{0,40}}[ =]){_QUOTED}"),
        rf"\1{HIDDEN}",
    ),
    # NAME=value in a command, name: value in YAML and JSON
    (
        re.compile(
            rf"""(?i)(?<![\w-])((?:[\w-]{{0,40}}[_-])?(?:{_SECRET})(?:[_-]\w{{1,40}})?|\w{{0,40}}(?:AccountKey|SharedAccessSignature)"""
            r"""|X-(?:Amz|Goog|Ms)-[\w-]{1,40})(\\?["']?(?:=|:\s+|\\?":\s*|%3D))(\\?["']?)(?!\s)[^\s'"&;,)\]}]+"""
        ),
        rf"\1\2\3{HIDDEN}",
    ),
    (
        re.compile(
            r"""(?i)(?<![\w-])((?:[\w-]{0,40}[_-])?token)((?:=|:\s)\\?["']?)(?!<)[^\s'"&;,)\]}]{8,}"""
        ),
        rf"\1\2{HIDDEN}",
    ),
    # what services give out can be told by its beginning
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|gh[opusr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
            r"|xox[abeprs]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{30,}|ya29\.[\w-]+"
            r"|eyJ[\w-]{10,}\.[\w-]+(?:\.[\w-]*)?)"
        ),
        HIDDEN,
    ),
)
_COMMAND = re.compile(r"pipe:[^\n]*")
_WORD = re.compile(r"(?<![\w./{}+-])[\w+-]{20,}={0,2}(?![\w./{}])")
_HEXADECIMAL = re.compile(r"[0-9a-f]{32,}")
_KINDS = (re.compile(r"[a-z]"), re.compile(r"[A-Z]"), re.compile(r"\d"))


def redacted(text: str) -> str:
    """`text` with *** in place of what could open a door; what is no secret stays as it is. Twice changes no more.

    Of a URL: user and password, and every value of its query, since each service has its own names. Of a command:
    headers, passwords and tokens of options and variables, and long words that look like keys.
    """
    text = _URL.sub(lambda found: _redacted_url(found[0]), text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _COMMAND.sub(lambda found: _WORD.sub(_redacted_word, found[0]), text)


def _redacted_word(word: re.Match) -> str:
    """In a command, a long word of both cases and digits, or of hexadecimal digits, is hardly the name of a file."""
    is_key = _HEXADECIMAL.fullmatch(word[0]) or all(kind.search(word[0]) for kind in _KINDS)
    return HIDDEN if is_key else word[0]


def _redacted_url(url: str) -> str:
    url = _USER_INFO.sub(rf"\1{HIDDEN}@", url, count=1)
    # elsewhere a question mark is a wildcard
    if url.lower().startswith(("http://", "https://")):
        url = _BARE_QUERY.sub(f"?{HIDDEN}", url)
    return _PAIR.sub(rf"\1{HIDDEN}", url)


def redacted_values(values: Any) -> Any:
    """Plain nested values, as of a config, with every text redacted; keys stay."""
    if isinstance(values, dict):
        return {key: redacted_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [redacted_values(value) for value in values]
    return redacted(values) if isinstance(values, str) else values


class RedactingFormatter(logging.Formatter):
    """For every handler of a log: what it writes is redacted, tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        """Format as usual, then redact."""
        return redacted(super().format(record))


def redact_the_unexpected() -> None:
    """From now on what Python itself prints is redacted: tracebacks of any thread, logs without handlers."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(RedactingFormatter())
    sys.excepthook = _print_redacted
    threading.excepthook = lambda found: _print_redacted(found.exc_type, found.exc_value, found.exc_traceback)


def _print_redacted(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
