"""The statistics page: one HTML file with its charts and sample pictures inside. Every text of the data is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from data_tools.stats.charts import bar_chart, histogram, percent, short
from data_tools.stats.style import STYLE
from data_tools.stats.summary import Summary
from data_tools.stats.tally import Shown, Tally

_BARS = 20
_BAD_SHOWN = 50


def page(title: str, tally: Tally, summary: Summary) -> str:
    """Give the whole page."""
    body = "".join(
        (
            f"<header><h1>{escape(title)}</h1>{_tiles(_headline(summary))}</header>",
            _section("Pictures", _charts(_picture_charts(tally))),
            _section("Captions", _charts(_caption_charts(tally, summary["captions"]))),
            _section("Languages", _languages(summary["captions"])),
            _section("Objects", _charts(_object_charts(tally, summary["objects"]))),
            _section("Bad samples", _bad(summary["bad"])),
            _section("Samples", _samples(tally.shown)),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _headline(summary: Summary) -> dict[str, str]:
    pictures, captions, decoding = summary["pictures"], summary["captions"], summary["decoding"]
    over = captions.get("over_context_length_share")
    values = {
        "samples": f"{summary['samples']:,}",
        "shards": f"{summary['shards']['read']:,}",
        "captions": f"{captions['number']:,}",
        "repeated pictures": percent(pictures["duplicates"]["share"], 1),
        "repeated captions": percent(captions["duplicates"]["share"], 1),
        "bad samples": f"{sum(summary['bad']['causes'].values()):,}",
        "decoded per second and core": short(round(decoding["pictures_per_second_and_core"])),
    }
    if over is not None:
        values[f"over {captions['context_length']} tokens"] = percent(over, 1)
    return values


def _tiles(values: dict[str, str]) -> str:
    cards = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="tiles">{"".join(cards)}</dl>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _charts(charts: Iterable[str]) -> str:
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _picture_charts(tally: Tally) -> list[str]:
    return [
        histogram("width", tally.widths, "pixels"),
        histogram("height", tally.heights, "pixels"),
        histogram("area", tally.megapixels, "megapixels"),
        histogram("aspect ratio", tally.aspects, "width / height", is_ratio=True),
        histogram("file size", tally.picture_bytes, "bytes"),
        bar_chart("format", tally.formats.most_common(_BARS), tally.picture_bytes.count),
    ]


def _caption_charts(tally: Tally, captions: Summary) -> list[str]:
    number = captions["number"]
    return [
        histogram("length", tally.characters, "characters"),
        histogram("length with the end token", tally.tokens, "tokens"),
        histogram("captions per picture", tally.captions_per_picture, "captions"),
        _frequent("most frequent captions", captions["most_frequent"], number, least=2),
        _frequent("most frequent words", captions["words"], tally.words.counts.total() + tally.words.dropped),
    ]


def _object_charts(tally: Tally, objects: Summary) -> list[str]:
    whole = tally.labels.counts.total() + tally.labels.dropped
    return [
        histogram("objects per picture that has any", tally.objects_per_picture, "objects"),
        _frequent("labels", objects["labels"], whole),
    ]


def _frequent(title: str, texts: Summary, whole: int, *, least: int = 1) -> str:
    note = "" if texts["is_exact"] else "at least so many"
    rows = [(text, count) for text, count in texts["top"][:_BARS] if count >= least]
    return bar_chart(title, rows, whole, note)


def _languages(captions: Summary) -> str:
    languages = captions["languages"]
    if not languages:
        return ""
    has_tokens = "tokens" in captions
    head = ("language", "captions", "share", "mean characters", *(["mean tokens"] if has_tokens else []))
    rows = [
        [name, each["captions"], percent(each["captions"], captions["number"]), each["mean_characters"]]
        + ([each["mean_tokens"]] if has_tokens else [])
        for name, each in languages.items()
    ]
    return _table(head, rows)


def _bad(bad: Summary) -> str:
    if not bad["causes"]:
        return ""
    named = bad["named"][:_BAD_SHOWN]
    return _table(("cause", "samples"), list(bad["causes"].items())) + _table(
        ("shard", "sample", "cause", "detail"), [list(each.values()) for each in named]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    if isinstance(value, float):
        return f'<td class="number">{short(value)}</td>'
    return f'<td dir="auto">{escape(str(value))}</td>'


def _samples(shown: Sequence[Shown]) -> str:
    if not shown:
        return ""
    cards = "".join(
        f'<figure><img src="{escape(each.url)}" alt="" loading="lazy">'
        + "".join(
            f'<p dir="auto">{_language(language)}<bdi>{escape(text)}</bdi></p>'
            for language, text in each.captions
        )
        + f"<small>{escape(each.name)} · {each.width} × {each.height}</small></figure>"
        for each in shown
    )
    return f'<div class="samples">{cards}</div>'


def _language(language: str) -> str:
    return f'<span class="language">{escape(language)}</span> ' if language else ""
