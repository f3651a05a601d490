"""Tables, heat-maps and galleries of evaluation details. Each function gives an HTML fragment.

An evaluator's details name the sections they want by their keys, so a new evaluator may reuse any of them.
Captions come from the data and are untrusted: every text is escaped.
"""

import math
from collections.abc import Iterable
from html import escape
from typing import Any

from siglip_train.report.charts import short

Details = dict[str, Any]


def table(head: Iterable[str], body: Iterable[Iterable[Any]], *, label: str = "") -> str:
    """Give a table; numbers are right-aligned and shortened."""
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in body)
    caption = f"<caption>{escape(label)}</caption>" if label else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{top}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value:,}</td>'
    if isinstance(value, float):
        return f'<td class="number">{short(value)}</td>'
    return f'<td dir="auto">{escape(str(value))}</td>'


def tiles(values: dict[str, str]) -> str:
    """Give a row of small cards: a name and a number each."""
    cards = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="tiles">{"".join(cards)}</dl>'


def shown(name: str, value: float) -> str:
    """Give recalls and accuracies in per cent, other numbers as they are."""
    is_share = "recall" in name or "acc" in name
    return f"{100 * value:.1f} %" if is_share and math.isfinite(value) else short(value)


def task_section(name: str, evaluation: dict[str, Any]) -> str:
    """Give everything about one task: its numbers, then a fragment for each kind of detail it has."""
    details = evaluation.get("details") or {}
    step = evaluation.get("step")
    when = "" if step is None else f" <small>at step {step:,}</small>"
    parts = [
        tiles(_numbers(evaluation.get("metrics") or {})),
        _by_language(details.get("languages") or {}),
        _groups(details.get("groups") or []),
        _similarity(details.get("similarity") or {}),
        _image_retrieval(details.get("image_retrieval") or []),
        _text_retrieval(details.get("text_retrieval") or []),
        _confusions(details.get("confusions") or []),
        _classes(details.get("classes") or []),
        _mistakes(details.get("mistakes") or []),
        _counts(details.get("counts") or {}),
    ]
    return f"<section><h3>{escape(name)}{when}</h3>{''.join(parts)}</section>"


def _numbers(metrics: dict[str, float]) -> dict[str, str]:
    """Overall metrics, with their confidence intervals where there are some."""
    numbers = {}
    for name, value in metrics.items():
        if "/" in name or name.removesuffix("_low").removesuffix("_high") != name:
            continue
        numbers[name] = shown(name, value)
        if f"{name}_low" in metrics:
            numbers[name] += " ({} – {})".format(
                *(shown(name, metrics[f"{name}_{end}"]) for end in ("low", "high"))
            )
    return numbers


def _by_language(languages: dict[str, dict[str, float]]) -> str:
    if len(languages) < 2:
        return ""
    names = [name for name in next(iter(languages.values())) if "recall" in name]
    return table(
        ("language", *(name.replace("_recall", "") for name in names)),
        (
            (language or "not named", *(shown(name, values[name]) for name in names))
            for language, values in languages.items()
        ),
        label="by language",
    )


def _similarity(similarity: Details) -> str:
    values = similarity.get("values") or []
    finite = [value for row in values for value in row if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    pictures = "".join(f'<th><img src="{_source(url)}" alt=""></th>' for url in similarity["pictures"])
    rows = []
    for index, (caption, row) in enumerate(zip(similarity["captions"], values, strict=True)):
        cells = "".join(
            f'<td{" class=own" if column == index else ""} style="--v:{_share(value, low, high):.2f}" '
            f'title="{value:.3f}"></td>'
            for column, value in enumerate(row)
        )
        rows.append(f'<tr><th dir="auto" title="{escape(caption)}">{escape(caption)}</th>{cells}</tr>')
    return (
        "<h4>Similarity of captions and images "
        f"<small>cosine {low:.2f} to {high:.2f}; outlined: the pairs</small></h4>"
        f'<div class="scroll"><table class="heat"><thead><tr><th></th>{pictures}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _share(value: float, low: float, high: float) -> float:
    if not math.isfinite(value):
        return 0.0
    return (value - low) / (high - low) if high > low else 1.0


def _image_retrieval(entries: list[Details]) -> str:
    if not entries:
        return ""
    rows = "".join(
        f'<div class="query"><p dir="auto">{_language(entry)}{escape(entry["query"])}</p><div class="found">'
        + "".join(_picture(found, f"{found['score']:.2f}", found["correct"]) for found in entry["results"])
        + "</div></div>"
        for entry in entries
    )
    return _queries("Images found for a caption", "framed: the right one", rows)


def _text_retrieval(entries: list[Details]) -> str:
    if not entries:
        return ""
    rows = "".join(
        f'<div class="query side"><img src="{_source(entry["picture"])}" alt=""><ol>'
        + "".join(
            f"<li{' class=right' if found['correct'] else ''}><bdi>{escape(found['text'])}</bdi> "
            f"<small>{found['score']:.2f}</small></li>"
            for found in entry["results"]
        )
        + f"</ol>{_language(entry)}</div>"
        for entry in entries
    )
    return _queries("Captions found for an image", "bold: a right one", rows)


def _queries(title: str, note: str, rows: str) -> str:
    return f'<h4>{title} <small>{note}</small></h4><div class="queries">{rows}</div>'


def _mistakes(entries: list[Details]) -> str:
    if not entries:
        return ""
    pictures = "".join(
        _picture(entry, f"{entry['predicted']} (is {entry['label']})", None, entry["key"])
        for entry in entries
    )
    return f'<h4>Mistakes <small>prediction (label)</small></h4><div class="found mistakes">{pictures}</div>'


def _picture(entry: Details, caption: str, is_right: bool | None, hint: str = "") -> str:  # noqa: FBT001
    kind = ' class="right"' if is_right else ""
    return (
        f'<figure{kind} title="{escape(hint)}"><img src="{_source(entry["picture"])}" alt="">'
        f'<figcaption dir="auto">{escape(caption)}</figcaption></figure>'
    )


def _language(entry: Details) -> str:
    language = entry.get("language")
    return f'<span class="language">{escape(language)}</span> ' if language else ""


def _confusions(entries: list[Details]) -> str:
    if not entries:
        return ""
    rows = ((entry["label"], entry["predicted"], entry["images"]) for entry in entries)
    return table(("label", "taken for", "images"), rows, label="most frequent confusions")


def _groups(entries: list[Details]) -> str:
    if not entries:
        return ""
    rows = ((entry["name"], shown("acc1", entry["acc1"]), entry["images"]) for entry in entries)
    return table(("group", "acc1", "images"), rows, label="by group")


def _classes(entries: list[Details]) -> str:
    if not entries:
        return ""
    rows = (
        (entry["name"], shown("recall", entry["recall"]), entry["images"])
        for entry in sorted(entries, key=lambda entry: entry["recall"])
    )
    classes = table(("class", "recall", "images"), rows)
    return f"<details><summary>recall of each class</summary>{classes}</details>"


def _counts(counts: dict[str, int]) -> str:
    if not any(name.startswith(("bad/", "excluded/")) for name in counts):
        return ""
    return table(("samples", "number"), counts.items(), label="some samples could not be used")


def _source(url: str) -> str:
    # nothing but an embedded picture: the report must never fetch
    return escape(url) if url.startswith("data:image/") else ""
