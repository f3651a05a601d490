"""What a filtering run has kept and dropped: as JSON, as a list of what was dropped, as tables on the terminal."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.filter.decide import BROKEN, Verdict
from data_tools.filter.look import Seen
from data_tools.filter.write import WriteTask
from siglip_train.data.shards.reader import short_name
from siglip_train.files.atomic import appearing
from siglip_train.redact import redacted

REPORT, DROPPED = "report.json", "dropped.tsv"
_NAMED = 1000
_LANGUAGES = 20
_PLAIN_WIDTH = 120


def results(
    urls: Sequence[str], seen: Sequence[Seen], verdict: Verdict, tasks: Sequence[WriteTask]
) -> dict[str, Any]:
    """The counts of a complete run, for JSON."""
    faults = [fault for part in seen for fault in part.faults]
    cut = sum(len(part.faults) - int(part.broken.sum()) for part in seen)
    first = Counter(verdict.first.tolist())
    dropped = {
        name: {"first": first[number], "each": each}
        for number, (name, each) in enumerate(zip(verdict.names, verdict.each, strict=True))
    }
    # samples that the torn end of a shard has cut are in no row
    dropped[BROKEN]["first"] += cut
    dropped[BROKEN]["each"] += cut
    samples = len(verdict.first) + cut
    files = {task.url: (task.path.name, len(task.rows)) for task in tasks}
    return {
        "samples": samples,
        "kept": int(verdict.stays.sum()),
        "dropped": dropped,
        "broken": dict(Counter(fault.cause for fault in faults).most_common()),
        "broken_named": [fault._asdict() for fault in faults[:_NAMED]],
        "languages": _languages(seen, verdict),
        "balance": verdict.balance or None,
        "files": [
            {"source": redacted(url), "samples": len(part.keys), "file": files[url][0] if url in files else None,
             "kept": files[url][1] if url in files else 0}
            for url, part in zip(urls, seen, strict=True)
        ],
    }  # fmt: skip


def _languages(seen: Sequence[Seen], verdict: Verdict) -> dict[str, Any]:
    """Language -> samples, kept, and dropped by the first rule."""
    names, number = np.unique(np.concatenate([part.languages for part in seen]), return_inverse=True)
    table = np.zeros((len(names), len(verdict.names) + 1), dtype=np.int64)
    np.add.at(table, (number, verdict.first), 1)
    rows = {}
    # the most frequent first
    for place in np.argsort(-table.sum(axis=1), kind="stable").tolist():
        # the number of what stays is -1, the last column
        *dropped, kept = table[place].tolist()
        counts = {rule: count for rule, count in zip(verdict.names, dropped, strict=True) if count}
        rows[names[place].decode()] = {"samples": kept + sum(dropped), "kept": kept, "dropped": counts}
    return rows


def save_dropped(path: Path, urls: Sequence[str], seen: Sequence[Seen], verdict: Verdict) -> None:
    """A line for every sample that was dropped: where it is, by which rule first, and a detail."""
    with appearing(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("shard\tkey\trule\tdetail\n")
        for line in _dropped(urls, seen, verdict):
            file.write("\t".join(" ".join(cell.split()) for cell in line) + "\n")


def _dropped(
    urls: Sequence[str], seen: Sequence[Seen], verdict: Verdict
) -> Iterator[tuple[str, str, str, str]]:
    shards = [short_name(url) for url in urls]
    ends = np.cumsum([len(part.keys) for part in seen])

    def name(place: int) -> str:
        number = int(np.searchsorted(ends, place, side="right"))
        return f"{shards[number]}/{seen[number].keys[place - ends[number]].decode()}"

    for shard, part, end in zip(shards, seen, ends.tolist(), strict=True):
        details = {fault.key: f"{fault.cause}: {fault.detail}" for fault in part.faults}
        start = end - len(part.keys)
        for row in np.flatnonzero(verdict.first[start:end] >= 0).tolist():
            key, rule = part.keys[row].decode(), verdict.names[verdict.first[start + row]]
            origin = int(verdict.origin[start + row])
            detail = f"like {name(origin)}" if origin >= 0 else ""
            yield shard, key, rule, details[key] if rule == BROKEN else detail
        known = {key.decode() for key in part.keys[part.broken].tolist()}
        for fault in part.faults:
            if fault.key not in known:
                yield shard, fault.key, BROKEN, f"{fault.cause}: {fault.detail}"


def print_tables(report: dict[str, Any]) -> None:
    """Print what was there, what went, and what is left."""
    console = Console()
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    console.print(_rules(report))
    if len(report["languages"]) > 1:
        console.print(_language_table(report["languages"]))
    if report["balance"]:
        console.print(_balance(report["balance"]))
        for each in report["balance"]["left_out"]:
            print(f"left as it was, {each}")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _rules(report: dict[str, Any]) -> Table:
    table = _table("", "samples", "met by the rule")
    table.add_row("before", f"{report['samples']:,}", "")
    for name, counts in report["dropped"].items():
        # Text: what looks like markup in a pattern is none
        table.add_row(Text(f"  {name}"), f"{-counts['first']:,}", f"{counts['each']:,}")
        if name == BROKEN:
            for cause, count in report["broken"].items():
                table.add_row(Text(f"    {cause}", style="dim"), "", f"{count:,}")
    table.add_row("after", f"{report['kept']:,}", _share(report["kept"], report["samples"]))
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _language_table(languages: dict[str, Any]) -> Table:
    table = _table("language", "before", "after", "kept")
    shown = list(languages.items())
    rest = shown[_LANGUAGES:]
    for name, counts in shown[:_LANGUAGES]:
        kept = _share(counts["kept"], counts["samples"])
        table.add_row(Text(name), f"{counts['samples']:,}", f"{counts['kept']:,}", kept)
    if rest:
        before, after = (sum(counts[column] for _, counts in rest) for column in ("samples", "kept"))
        table.add_row(f"{len(rest)} more", f"{before:,}", f"{after:,}", _share(after, before))
    return table


def _balance(balance: dict[str, Any]) -> Table:
    table = _table("share of", "among samples with", "target", "before", "after", "samples before", "after")
    for row in balance["shares"]:
        among = row["attribute"] + (f" and {row['concept']}" if row["concept"] else "")
        after = "-" if row["after"] is None else f"{row['after']:.1%}"
        table.add_row(Text(row["value"]), Text(among), f"{row['target']:.1%}", f"{row['before']:.1%}", after,
                      f"{row['samples_before']:,}", f"{row['samples_after']:,g}")  # fmt: skip
    return table
