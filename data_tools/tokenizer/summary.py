"""From tallies to numbers: a row for each language and one for all, ready for JSON, and as a table."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.tokenizer.tally import Tally, Vocabulary

Summary = dict[str, Any]

ALL = "all"
# shorter words say little: one piece a letter is their best
_WORST_CHARACTERS = 3
_WORST = 20
_SHOWN_WORST = 5
_WORD_WIDTH = 24
# of a file or pipe, which has no width of its own
_PLAIN_WIDTH = 120
# scripts that are written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def summarise(tallies: Mapping[str, Tally], vocabulary: Vocabulary) -> Summary:
    """All numbers: of the vocabulary, of all captions, and of each language, the most frequent first."""
    whole = Tally()
    for tally in tallies.values():
        whole.merge(tally)
    names = sorted(tallies, key=lambda name: (-tallies[name].captions, name))
    covered = {character for character in whole.characters if vocabulary.covers(character)}
    return {
        "context_length": vocabulary.tokenizer.context_length,
        "vocabulary": {"pieces": vocabulary.size, "used": int(np.count_nonzero(whole.used))},
        ALL: _row(whole, vocabulary, covered),
        "languages": {name: _row(tallies[name], vocabulary, covered) for name in names},
    }


def _row(tally: Tally, vocabulary: Vocabulary, covered: set[str]) -> Summary:
    characters = tally.characters.total()
    joined = sum(count for each, count in tally.characters.items() if _WITHOUT_SPACES.match(each))
    missing = [(each, count) for each, count in tally.characters.most_common() if each not in covered]
    return {
        "captions": tally.captions,
        "words": tally.word_count,
        "characters": characters,
        "tokens": {
            "mean": tally.tokens.mean,
            "p50": tally.tokens.quantile(0.5),
            "p95": tally.tokens.quantile(0.95),
            "max": tally.tokens.high,
        },
        "has_words": 2 * joined <= characters,
        "tokens_per_word": _ratio(tally.pieces, tally.word_count),
        "tokens_per_character": _ratio(tally.pieces, characters),
        "byte_share": _ratio(tally.as_bytes, tally.pieces),
        "unknown_share": _ratio(tally.unknown, tally.pieces),
        "coverage": 1 - _ratio(sum(count for _, count in missing), characters),
        "not_covered": [each for each, _ in missing[:_WORST]],
        "over_context_length_share": _ratio(tally.too_long, tally.captions),
        "pieces_used": int(np.count_nonzero(tally.used)),
        "worst_words": _worst_words(tally, vocabulary),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _worst_words(tally: Tally, vocabulary: Vocabulary) -> list[Summary]:
    """The words that take the most pieces for a character, of equally bad ones the most frequent."""
    found = [
        (len(vocabulary.encode(word)), count, word)
        for word, count in tally.words.counts.items()
        if len(word) >= _WORST_CHARACTERS
    ]
    found.sort(key=lambda each: (-each[0] / len(each[2]), -each[1], each[2]))
    return [{"word": word, "pieces": pieces, "count": count} for pieces, count, word in found[:_WORST]]


def print_table(summary: Summary) -> None:
    """A line for each language, and the vocabulary."""
    console = Console()
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("language")
    length = summary["context_length"]
    for name in ("captions", "tokens p50", "p95", "max", f"over {length}", "per word", "per character", "as bytes",
                 "unknown", "covered", "pieces"):  # fmt: skip
        table.add_column(name, justify="right")
    worst = Table(box=None, pad_edge=False, header_style="bold")
    worst.add_column("language")
    worst.add_column("words of the most pieces a character")
    for name, row in (*summary["languages"].items(), (ALL, summary[ALL])):
        # Text: what looks like markup in a word is none
        table.add_row(Text(name), *_cells(row))
        worst.add_row(Text(name), Text(_listed(row["worst_words"])))
    console.print(table)
    console.print(worst)
    used, size = summary["vocabulary"]["used"], summary["vocabulary"]["pieces"]
    print(f"{used:,} of {size:,} pieces occur ({_ratio(used, size):.1%})")


def _cells(row: Summary) -> list[str]:
    tokens = row["tokens"]
    return [
        f"{row['captions']:,}",
        *(f"{tokens[name]:.0f}" for name in ("p50", "p95", "max")),
        f"{row['over_context_length_share']:.1%}",
        f"{row['tokens_per_word']:.2f}" if row["has_words"] else "",
        f"{row['tokens_per_character']:.2f}",
        *(f"{row[name]:.2%}" for name in ("byte_share", "unknown_share", "coverage")),
        f"{row['pieces_used']:,}",
    ]


def _listed(words: list[Summary]) -> str:
    return ", ".join(f"{each['word'][:_WORD_WIDTH]} {each['pieces']}" for each in words[:_SHOWN_WORST])
