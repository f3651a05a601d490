"""Results in the names and form of CLIP_benchmark, so that its tables can hold them beside those of other models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip_train.evals.base import Evaluation, Evaluator
from siglip_train.files.atomic import write_text
from siglip_train.files.records import to_json


def benchmark_results(
    tasks: Mapping[str, Evaluator], evaluations: Mapping[str, Evaluation], *, model: str, pretrained: str
) -> list[dict[str, Any]]:
    """Give an object a task and language with dataset, model, pretrained, task, metrics and language.

    dataset is the task's name in the config. Tasks that CLIP_benchmark does not have are left out, and so are metrics
    of groups, which would each be a column of its table.
    """
    return [
        {
            "dataset": name,
            "model": model,
            "pretrained": pretrained,
            "task": kind,
            "metrics": metrics,
            "language": language,
        }
        for name, evaluation in evaluations.items()
        if (kind := getattr(tasks[name], "task", None)) is not None
        for language, metrics in _by_language(kind, getattr(tasks[name], "language", "en"), evaluation)
    ]


def _by_language(kind: str, language: str, evaluation: Evaluation) -> list[tuple[str, dict[str, float]]]:
    parts: dict[str, dict[str, float]] = {}
    for name, value in evaluation.metrics.items():
        part, _, metric = name.rpartition("/")
        parts.setdefault(part, {})[metric] = value
    overall = parts.pop("")
    if kind == "zeroshot_retrieval" and parts:
        # what stands beside them is their average, which is no result of any language
        return list(parts.items())
    return [(language, overall)]


def write_benchmark_results(folder: Path, results: list[dict[str, Any]]) -> None:
    """Write each result to a file of its own, named as CLIP_benchmark does without the path of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        parts = (result[part].replace("/", "_") for part in ("dataset", "model", "language", "task"))
        write_text(folder / f"{'_'.join(parts)}.json", to_json(result) + "\n")
