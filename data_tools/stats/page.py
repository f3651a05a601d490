"""The statistics page: one HTML file with its charts and sample images inside."""

from typing import Any

from markupsafe import Markup

from data_tools.stats.histogram import histogram
from data_tools.stats.summary import Summary
from data_tools.stats.tally import Tally
from siglip_train.report.charts import bar_chart
from siglip_train.report.numbers import percent, short
from siglip_train.report.render import render

_BARS = 20
_BAD_SHOWN = 50


def page(title: str, tally: Tally, summary: Summary) -> str:
    """Give the whole page."""
    bad = summary["bad"]
    return render(
        "stats.html",
        package="data_tools.stats",
        title=title,
        headline=_headline(summary),
        images=_image_charts(tally),
        captions=_caption_charts(tally, summary["captions"]),
        objects=_object_charts(tally, summary["objects"]),
        languages=_languages(summary["captions"]),
        causes=bad["causes"],
        bad=[list(each.values()) for each in bad["named"][:_BAD_SHOWN]],
        samples=tally.shown,
    )


def _headline(summary: Summary) -> dict[str, str]:
    images, captions, decoding = summary["pictures"], summary["captions"], summary["decoding"]
    over = captions.get("over_context_length_share")
    values = {
        "samples": f"{summary['samples']:,}",
        "shards": f"{summary['shards']['read']:,}",
        "captions": f"{captions['number']:,}",
        "repeated images": percent(images["duplicates"]["share"]),
        "repeated captions": percent(captions["duplicates"]["share"]),
        "bad samples": f"{sum(summary['bad']['causes'].values()):,}",
        "decoded per second and core": short(round(decoding["pictures_per_second_and_core"])),
    }
    if over is not None:
        values[f"over {captions['context_length']} tokens"] = percent(over)
    return values


def _image_charts(tally: Tally) -> list[Markup]:
    return [
        histogram("width", tally.widths, "pixels"),
        histogram("height", tally.heights, "pixels"),
        histogram("area", tally.megapixels, "megapixels"),
        histogram("aspect ratio", tally.aspects, "width / height", is_ratio=True),
        histogram("file size", tally.image_bytes, "bytes"),
        bar_chart("format", tally.formats.most_common(_BARS), tally.image_bytes.count),
    ]


def _caption_charts(tally: Tally, captions: Summary) -> list[Markup]:
    words = tally.words.counts.total() + tally.words.dropped
    return [
        histogram("length", tally.characters, "characters"),
        histogram("length with the end token", tally.tokens, "tokens"),
        histogram("captions per image", tally.captions_per_image, "captions"),
        _frequent("most frequent captions", captions["most_frequent"], captions["number"], least=2),
        _frequent("most frequent words", captions["words"], words),
    ]


def _object_charts(tally: Tally, objects: Summary) -> list[Markup]:
    return [
        histogram("objects per image that has any", tally.objects_per_image, "objects"),
        _frequent("labels", objects["labels"], tally.labels.counts.total() + tally.labels.dropped),
    ]


def _frequent(title: str, texts: Summary, whole: int, *, least: int = 1) -> Markup:
    note = "" if texts["is_exact"] else "at least so many"
    rows = [(text, count) for text, count in texts["top"][:_BARS] if count >= least]
    return bar_chart(title, rows, whole, note)


def _languages(captions: Summary) -> list[list[Any]]:
    """The table of languages: its head, then its rows."""
    has_tokens = "tokens" in captions
    head = ["language", "captions", "share", "mean characters", *(["mean tokens"] if has_tokens else [])]
    rows = [
        [name, each["captions"], percent(each["captions"], captions["number"]), each["mean_characters"]]
        + ([each["mean_tokens"]] if has_tokens else [])
        for name, each in captions["languages"].items()
    ]
    return [head, *rows]
