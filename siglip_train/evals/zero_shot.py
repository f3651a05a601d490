"""Zero-shot classification: an image belongs to the class whose averaged prompt embedding is nearest."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from siglip_train.data.evaluation import EvaluationSource
from siglip_train.data.select import Selection, as_selection
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder, Evaluation, ImageSet
from siglip_train.evals.gallery import spread, thumbnail
from siglip_train.evals.prompts import canonicalise, fill, read_class_names, read_templates
from siglip_train.evals.ranking import best_ranks, recall_at, top


def class_embeddings(prompts: Tensor) -> Tensor:
    """Normalise each prompt, average over templates, normalise again: `[C, T, E]` -> `[C, E]`.

    The recipe of big_vision's discriminative classifier, of open_clip and of CLIP_benchmark.
    """
    unit = torch.nn.functional.normalize(prompts, dim=-1)
    return torch.nn.functional.normalize(unit.mean(dim=1), dim=-1)


def classification_metrics(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Give acc1, acc5 (from 5 classes on) and mean_per_class_recall, under CLIP_benchmark's names.

    images `[n, E]`, classes `[C, E]`, labels `[n]`. The recall is averaged over the classes that occur.
    """
    ranks = best_ranks(images, classes, labels, torch.arange(len(classes), device=labels.device))
    metrics = {"acc1": recall_at(ranks, 1)}
    if len(classes) >= 5:
        metrics["acc5"] = recall_at(ranks, 5)
    seen, hits = _seen_and_hits(labels, ranks, len(classes))
    metrics["mean_per_class_recall"] = (hits[seen > 0] / seen[seen > 0]).mean().item()
    return metrics


def _seen_and_hits(labels: Tensor, ranks: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    seen = torch.bincount(labels, minlength=classes).double()
    return seen, torch.bincount(labels[ranks < 1], minlength=classes).double()


@dataclass(kw_only=True)
class ZeroShotClassification:
    """Zero-shot accuracy on labelled shards (recipe: SigLIP's evaluation, CLIP_benchmark's metric names).

    classnames: list, file, or "imagenet". templates: list, file, or "openai".
    label: member or `json:field` with the class index. canonical: lower-case prompts without punctuation.
    gallery: mistaken images kept for the report.
    """

    shards: str | list[str]
    classnames: str | list[str]
    templates: str | list[str] = "openai"
    image: str = EvaluationSource.image
    label: str = "cls"
    canonical: bool = False
    max_samples: int | None = None
    select: Selection | dict[str, Any] = field(default_factory=Selection)
    gallery: int = 24

    def __post_init__(self) -> None:
        """Check the selection."""
        self.select = as_selection(self.select)

    def run(self, encoder: Encoder) -> Evaluation:
        """Embed prompts and images, compare. All ranks."""
        names = read_class_names(self.classnames)
        classes = class_embeddings(self._embed_prompts(encoder, names))
        images = encoder.encode_images(
            EvaluationSource(
                shards=self.shards,
                image=self.image,
                label=self.label,
                max_samples=self.max_samples,
                select=as_selection(self.select),
            )
        )
        labels = self._checked_labels(images, len(names))
        device = encoder.world.device
        metrics = classification_metrics(images.embeddings.to(device), classes.to(device), labels.to(device))
        metrics["n"] = float(len(labels))
        details = self._details(images, classes, labels, names) if encoder.world.is_main else {}
        return Evaluation(metrics, details)

    def _embed_prompts(self, encoder: Encoder, names: list[str]) -> Tensor:
        templates = read_templates(self.templates)
        prompts = [fill(template, name) for name in names for template in templates]
        if self.canonical:
            prompts = [canonicalise(prompt) for prompt in prompts]
        return encoder.encode_texts(prompts).unflatten(0, (len(names), len(templates)))  # [C, T, E]

    def _checked_labels(self, images: ImageSet, classes: int) -> Tensor:
        assert images.labels is not None
        outside = ((images.labels < 0) | (images.labels >= classes)).nonzero().flatten().tolist()
        if outside:
            first = outside[0]
            raise UserError(
                f"label {int(images.labels[first])} of sample {images.keys[first]} has no class name: "
                f"classnames names {classes} classes, so labels are 0..{classes - 1}"
            )
        return images.labels

    def _details(self, images: ImageSet, classes: Tensor, labels: Tensor, names: list[str]) -> dict[str, Any]:
        predicted = torch.cat([top(block, classes, 1)[1][:, 0] for block in images.embeddings.split(4096)])
        seen, hits = _seen_and_hits(labels, (predicted != labels).long(), len(names))
        wrong = (predicted != labels).nonzero().flatten().tolist()
        return {
            "counts": images.counts,
            "classes": [
                {"name": name, "images": int(count), "recall": hit / count}
                for name, count, hit in zip(names, seen.tolist(), hits.tolist(), strict=True)
                if count
            ],
            "confusions": _confusions(labels, predicted, names),
            "mistakes": [
                {
                    "picture": thumbnail(images.picture(image)),
                    "key": images.keys[image],
                    "label": names[labels[image]],
                    "predicted": names[predicted[image]],
                }
                for image in (wrong[place] for place in spread(len(wrong), self.gallery))
            ],
        }


def _confusions(labels: Tensor, predicted: Tensor, names: list[str], count: int = 15) -> list[dict[str, Any]]:
    pairs = torch.stack([labels, predicted], dim=1)[labels != predicted]  # [wrong, 2]
    distinct, times = pairs.unique(dim=0, return_counts=True)
    order = times.argsort(descending=True, stable=True)[:count]
    return [
        {"label": names[label], "predicted": names[guess], "images": int(times[place])}
        for place, (label, guess) in zip(order.tolist(), distinct[order].tolist(), strict=True)
    ]
