"""What the page of a run shows of each evaluation: its numbers, and the tables that its details ask for.

An evaluator's details name the sections they want by their keys, so a new evaluator may reuse any of them.
`templates/task.html` draws what is given here, and the galleries and the heat-map from the details themselves.
"""

import math
from typing import Any

from siglip_train.report.numbers import shown

Details = dict[str, Any]


def task_section(name: str, evaluation: Details) -> dict[str, Any]:
    """Give everything about one task, as `templates/task.html` reads it; what a task lacks is empty."""
    details = evaluation.get("details") or {}

    def entries(key: str) -> list[Details]:
        return details.get(key) or []

    counts = details.get("counts") or {}
    has_failed = any(name.startswith(("bad/", "excluded/")) for name in counts)
    classes = sorted(entries("classes"), key=lambda entry: entry["recall"] or 0.0)
    return {
        "name": name,
        "step": evaluation.get("step"),
        "numbers": _numbers(evaluation.get("metrics") or {}),
        "languages": _by_language(details.get("languages") or {}),
        "groups": [(each["name"], shown(each["acc1"], "acc1"), each["images"]) for each in entries("groups")],
        "similarity": _similarity(details.get("similarity") or {}),
        "image_retrieval": entries("image_retrieval"),
        "text_retrieval": entries("text_retrieval"),
        "confusions": [(each["label"], each["predicted"], each["images"]) for each in entries("confusions")],
        "classes": [(each["name"], shown(each["recall"], "recall"), each["images"]) for each in classes],
        "mistakes": entries("mistakes"),
        "boxes": entries("boxes"),
        "captions": entries("captions"),
        "segments": entries("segments"),
        "segment_classes": [
            (each["name"], shown(each["iou"], "iou"), each["pixels"])
            for each in sorted(entries("segment_classes"), key=lambda entry: entry["iou"])
        ],
        "counts": list(counts.items()) if has_failed else [],
    }


def _numbers(metrics: dict[str, float]) -> dict[str, str]:
    """Overall metrics, with their confidence intervals where there are some."""
    numbers = {}
    for name, value in metrics.items():
        if "/" in name or name.endswith(("_low", "_high")):
            continue
        numbers[name] = shown(value, name)
        if f"{name}_low" in metrics:
            low, high = (shown(metrics[f"{name}_{end}"], name) for end in ("low", "high"))
            numbers[name] += f" ({low} – {high})"
    return numbers


def _by_language(languages: dict[str, dict[str, float]]) -> list[list[str]]:
    """The table of languages, where there are several: its head, then its rows."""
    if len(languages) < 2:
        return []
    names = [name for name in next(iter(languages.values())) if "recall" in name]
    rows = [
        [language or "not named", *(shown(values[name], name) for name in names)]
        for language, values in languages.items()
    ]
    return [["language", *(name.replace("_recall", "") for name in names)], *rows]


def _similarity(similarity: Details) -> Details | None:
    """The heat-map: its rows are (caption, cells), a cell is (value, 0..1 of the range, whether it is a pair)."""
    values = similarity.get("values") or []
    # a model that has diverged gives null
    finite = [value for row in values for value in row if value is not None and math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)

    def share(value: float | None) -> float:
        if value is None or not math.isfinite(value):
            return 0.0
        return (value - low) / (high - low) if high > low else 1.0

    rows = [
        (caption, [(value, share(value), column == index) for column, value in enumerate(row)])
        for index, (caption, row) in enumerate(zip(similarity["captions"], values, strict=True))
    ]
    return {"low": low, "high": high, "images": similarity["pictures"], "rows": rows}
