"""The numbers as tables on the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.stats.summary import Summary
from siglip_train.report.numbers import percent, short

_COLUMNS = ("mean", "min", "p5", "median", "p95", "p99", "max")
_LISTED = 8
_TEXT_WIDTH = 60


def print_tables(summary: Summary) -> None:
    """Print the numbers that matter most."""
    console = Console()
    console.print(_distributions(summary))
    console.print(_facts(summary))
    if summary["bad"]["causes"]:
        console.print(_bad(summary["bad"]))


def _distributions(summary: Summary) -> Table:
    images, captions = summary["pictures"], summary["captions"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    rows = {
        "width": images["width"],
        "height": images["height"],
        "megapixels": images["megapixels"],
        "width / height": images["aspect"],
        "bytes of an image": images["bytes"],
        "captions per image": captions["per_picture"],
        "characters of a caption": captions["characters"],
        "tokens of a caption": captions.get("tokens", {"count": 0}),
        "objects per image": summary["objects"]["per_picture"],
    }
    for name, numbers in rows.items():
        if numbers["count"]:
            table.add_row(name, *(short(numbers[column], 3) for column in _COLUMNS))
    return table


def _facts(summary: Summary) -> Table:
    images, captions, decoding = summary["pictures"], summary["captions"], summary["decoding"]
    table = Table(box=None, pad_edge=False, show_header=False)
    facts = {
        "samples": f"{summary['samples']:,}",
        "shards": f"{summary['shards']['read']:,}, {short(summary['shards']['bytes'] / 1e6, 3)} MB",
        "formats": _shares(images["formats"], images["number"]),
        "languages": _shares(
            {name: each["captions"] for name, each in captions["languages"].items()}, captions["number"]
        ),
        "repeated images": _repeated(images["duplicates"]),
        "repeated captions": _repeated(captions["duplicates"]),
        "frequent captions": _listed([pair for pair in captions["most_frequent"]["top"][:3] if pair[1] > 1]),
        "frequent words": _listed(captions["words"]["top"]),
        "labels": _listed(summary["objects"]["labels"]["top"]),
        "decoding": f"{decoding['pictures_per_second_and_core']:.0f} images/s, "
        f"{decoding['megabytes_per_second_and_core']:.1f} MB/s per core ({decoding['pictures']} images)",
    }
    if "tokens" in captions:
        share = percent(captions["over_context_length_share"])
        facts[f"over {captions['context_length']} tokens"] = f"{captions['over_context_length']:,} ({share})"
    for name, value in facts.items():
        if value:
            # Text: what looks like markup in a caption is none
            table.add_row(Text(name, style="bold"), Text(value))
    return table


def _shares(counts: dict[str, int], whole: int) -> str:
    shown = [f"{name} {percent(count, whole)}" for name, count in list(counts.items())[:_LISTED]]
    return ", ".join(shown) + (f", and {len(counts) - _LISTED} more" if len(counts) > _LISTED else "")


def _repeated(duplicates: Summary) -> str:
    if not duplicates["repeated"]:
        return "none"
    about = "about " if duplicates["is_estimate"] else ""
    return (
        f"{about}{duplicates['repeated']:,} ({percent(duplicates['share'])}), "
        f"the most frequent {duplicates['most_alike']:,} times"
    )


def _listed(top: list[list]) -> str:
    return ", ".join(f"{text[:_TEXT_WIDTH]} {count:,}" for text, count in top[:_LISTED])


def _bad(bad: Summary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bad samples")
    table.add_column("number", justify="right")
    table.add_column("such as")
    for cause, count in bad["causes"].items():
        first = next((each for each in bad["named"] if each["cause"] == cause), None)
        table.add_row(cause, f"{count:,}", Text(f"{first['shard']}/{first['key']}" if first else ""))
    return table
