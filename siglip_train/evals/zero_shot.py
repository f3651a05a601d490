"""Zero-shot classification: an image belongs to the class whose averaged prompt embedding is nearest."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from siglip_train.data.folders import BenchmarkFolder, benchmark_folder, class_folder_names
from siglip_train.data.prompts import canonicalise, fill, read_class_names, read_templates
from siglip_train.data.shards.select import Selection, as_selection
from siglip_train.errors import UserError
from siglip_train.evals.accuracy import (
    accuracy_intervals,
    accuracy_metrics,
    group_metrics,
    mean_average_precision,
    seen_and_hits,
)
from siglip_train.evals.base import Encoder, Evaluation, ImageSet
from siglip_train.evals.bootstrap import check_resamples
from siglip_train.evals.label_sets import (
    Truth,
    labelled_truth,
    mapped_truth,
    read_class_map,
    read_json,
    read_label_sets,
    target_tensor,
)
from siglip_train.evals.loader import EvaluationSource, check_found
from siglip_train.evals.ranking import best_ranks_in_sets, is_target, top
from siglip_train.models.siglip import class_embeddings
from siglip_train.report.thumbnail import spread, thumbnail


@dataclass(kw_only=True)
class ZeroShotClassification:
    """Zero-shot accuracy (recipe: SigLIP's evaluation, CLIP_benchmark's metric names).

    shards: shards, a folder in CLIP_benchmark's layout, or a folder of classes. classnames: list, file, or "imagenet";
    default: what the folder says. templates: list, file, or "openai"; default: the folder's, else "openai".
    label: member or `json:field` with the class index or a list of all that are right (an image with an empty list
    does not count), or `npy`; default: as the folder's type asks. label_sets: a file with such lists by key, such as
    `real.json` of ImageNet-ReaL. class_map: a file `{class: indices}` or ObjectNet's folder `mappings`, where classes
    of the set stand for others; only the mapped classes are predicted, only images of mapped classes count.
    canonical: lower-case prompts without punctuation. group: `json:field`, accuracy by its values. border: pixels cut
    off each image's sides. bootstrap: resamples for confidence intervals, 0 = none. language: of the prompts, for
    the results. gallery: mistaken images kept for the report.
    """

    task: ClassVar[str] = "zeroshot_classification"

    shards: str | list[str]
    classnames: str | list[str] | None = None
    templates: str | list[str] | None = None
    image: str = EvaluationSource.image
    label: str | None = None
    label_sets: str | None = None
    class_map: str | None = None
    canonical: bool = False
    group: str | None = None
    border: int = 0
    max_samples: int | None = None
    select: Selection | dict[str, Any] = field(default_factory=Selection)
    bootstrap: int = 0
    language: str = "en"
    gallery: int = 24

    def __post_init__(self) -> None:
        """Check ranges, what makes up the source, and what says what is right."""
        check_resamples(self.bootstrap)
        self._source = EvaluationSource(
            shards=self.shards,
            image=self.image,
            label=self.label,
            group=self.group,
            border=self.border,
            max_samples=self.max_samples,
            select=as_selection(self.select),
        )
        if self.class_map is not None and self.label_sets is not None:
            raise ValueError("class_map and label_sets both say what is right: give one of them")

    def check(self) -> None:
        """Find the shards, and read the files about classes, templates and labels."""
        check_found(self._source)
        folder = benchmark_folder(self.shards)
        self._class_names(folder)
        self._templates(folder)
        if self.class_map is not None:
            read_class_map(self.class_map)
        if self.label_sets is not None:
            read_json(self.label_sets)

    def run(self, encoder: Encoder) -> Evaluation:
        """Embed prompts and images, compare. All ranks."""
        folder = benchmark_folder(self.shards)
        names = self._class_names(folder)
        classes = class_embeddings(self._embed_prompts(encoder, names, folder))
        label = self.label or ("npy" if folder is not None and folder.type == "multilabel" else "cls")
        images = encoder.encode_images(replace(self._source, label=label))
        if label == "npy":
            return _multilabel(images, classes, encoder)
        truth = self._truth(images, names)
        candidates = classes[truth.candidates]
        parts = (images.embeddings[truth.rows], candidates, truth.targets)
        ranks = best_ranks_in_sets(*(part.to(encoder.world.device) for part in parts)).cpu()
        metrics, by_group = self._metrics(ranks, truth, images)
        if not encoder.world.is_main:
            return Evaluation(metrics, {})
        return Evaluation(
            metrics, {"groups": by_group, **self._details(images, candidates, truth, ranks, names)}
        )

    def _metrics(
        self, ranks: Tensor, truth: Truth, images: ImageSet
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        metrics = accuracy_metrics(ranks, len(truth.candidates), truth.owners) | {"n": float(len(ranks))}
        if self.bootstrap:
            metrics |= accuracy_intervals(ranks, len(truth.candidates), self.bootstrap)
        if self.group is None:
            return metrics, []
        by_group, table = group_metrics(ranks, [images.groups[row] for row in truth.rows])
        return metrics | by_group, table

    def _class_names(self, folder: BenchmarkFolder | None) -> list[str]:
        folders = class_folder_names(self.shards)
        found = (
            folder.classnames if folder is not None else [name.replace("_", " ") for name in folders.values()]
        )
        if self.classnames is None and (not found or (folder is None and all(map(str.isdigit, found)))):
            raise UserError(f"{self.shards} does not say what its classes are called: give classnames")
        names = read_class_names(self.classnames if self.classnames is not None else found or [])
        is_sorted = folders and not all(map(str.isdigit, folders.values())) and self.class_map is None
        if is_sorted and len(folders) != len(names):
            # folders are numbered in sorted order, so that all labels after a missing one would be wrong
            raise UserError(
                f"{self.shards} has {len(folders)} class folders, but there are {len(names)} classnames: "
                "name the classes of these folders only, or give a class_map"
            )
        return names

    def _templates(self, folder: BenchmarkFolder | None) -> list[str]:
        found = folder.templates if folder is not None else None
        return read_templates(self.templates or found or "openai")

    def _embed_prompts(self, encoder: Encoder, names: list[str], folder: BenchmarkFolder | None) -> Tensor:
        templates = self._templates(folder)
        prompts = [fill(template, name) for name in names for template in templates]
        if self.canonical:
            prompts = [canonicalise(prompt) for prompt in prompts]
        return encoder.encode_texts(prompts).unflatten(0, (len(names), len(templates)))  # [C, T, E]

    def _truth(self, images: ImageSet, names: list[str]) -> Truth:
        labels = images.labels
        assert labels is not None
        if self.class_map is not None:
            return mapped_truth(
                labels, read_class_map(self.class_map), class_folder_names(self.shards), len(names)
            )
        if self.label_sets is not None:
            labels = read_label_sets(self.label_sets, images.keys)
        return labelled_truth(labels, images.keys, names)

    def _details(
        self, images: ImageSet, classes: Tensor, truth: Truth, ranks: Tensor, names: list[str]
    ) -> dict[str, Any]:
        left_out = len(images.keys) - len(truth.rows)
        counts = images.counts | ({"excluded/no label that counts": left_out} if left_out else {})
        details: dict[str, Any] = {"counts": counts}
        if truth.owners is not None:
            seen, hits = seen_and_hits(ranks, truth.owners)
            details["classes"] = [
                {"name": truth.names[label], "images": int(count), "recall": hit / count}
                for label, (count, hit) in enumerate(zip(seen.tolist(), hits.tolist(), strict=True))
                if count
            ]
        wrong = ranks.nonzero().flatten()
        embeddings = images.embeddings[truth.rows][wrong]
        best = [top(block, classes, 1)[1][:, 0] for block in embeddings.split(4096)]
        predicted = [names[label] for label in truth.candidates[torch.cat(best)].tolist()]
        meant = _meant(truth, wrong, names)
        details["confusions"] = _confusions(list(zip(meant, predicted, strict=True)))
        details["mistakes"] = [
            {
                "picture": thumbnail(images.original(truth.rows[wrong[place]])),
                "key": images.keys[truth.rows[wrong[place]]],
                "label": meant[place],
                "predicted": predicted[place],
            }
            for place in spread(len(wrong), self.gallery)
        ]
        return details


def _multilabel(images: ImageSet, classes: Tensor, encoder: Encoder) -> Evaluation:
    """Rank the images for each class; one without a label is wrong for all, as in CLIP_benchmark."""
    assert images.labels is not None
    device = encoder.world.device
    is_right = is_target(target_tensor(images.labels), len(classes)).to(device)
    scores = images.embeddings.to(device) @ classes.T.to(device)
    metrics = {"mean_average_precision": mean_average_precision(scores, is_right), "n": float(len(scores))}
    return Evaluation(metrics, {"counts": images.counts} if encoder.world.is_main else {})


def _meant(truth: Truth, rows: Tensor, names: list[str]) -> list[str]:
    """Name what is right for each of these rows: its own class, or all labels."""
    if truth.owners is not None:
        return [truth.names[label] for label in truth.owners[rows].tolist()]
    sets = truth.targets[rows].tolist()
    return [" / ".join(names[truth.candidates[place]] for place in each if place >= 0) for each in sets]


def _confusions(pairs: list[tuple[str, str]], count: int = 15) -> list[dict[str, Any]]:
    return [
        {"label": label, "predicted": predicted, "images": images}
        for (label, predicted), images in Counter(sorted(pairs)).most_common(count)
    ]
