"""What a frozen image tower knows: classifiers trained on its pooled outputs, embedded once for all that crop alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from siglip_train.data.folders import benchmark_folder, class_folder_names
from siglip_train.data.shards.select import as_selection
from siglip_train.errors import UserError
from siglip_train.evals.accuracy import accuracy_metrics, seen_and_hits
from siglip_train.evals.base import Encoder, Evaluation, ImageSet
from siglip_train.evals.bootstrap import Share, check_resamples, confidence_intervals
from siglip_train.evals.features import Features, Method, features_of
from siglip_train.evals.few_shot import RidgeFewShot
from siglip_train.evals.linear_probe import LinearProbe
from siglip_train.evals.loader import EvaluationSource, check_found
from siglip_train.evals.nearest_neighbours import NearestNeighbours


def _methods() -> dict[str, Method]:
    return {"knn": NearestNeighbours(), "few_shot": RidgeFewShot(), "linear": LinearProbe()}


@dataclass(kw_only=True)
class Probes:
    """Accuracy of k nearest neighbours, ridge regression from a few shots, and a linear probe.

    train, test: shards (or a folder, as in zero-shot classification), or the fields of `EvaluationSource`: shards,
    image, label (default `cls`), max_samples, select. methods: by name; null leaves one out; those of one `center`
    share an embedding. bootstrap: resamples of the test images for confidence intervals, 0 = none.
    Metrics are `knn_`, `<shots>shot_` and `lp_` with acc1, acc5 and mean_per_class_recall, over repetitions.
    """

    task: ClassVar[str] = "linear_probe"

    train: str | dict[str, Any]
    test: str | dict[str, Any]
    methods: dict[str, Any] = field(default_factory=_methods)
    bootstrap: int = 0

    def __post_init__(self) -> None:
        """Check ranges and the sources."""
        check_resamples(self.bootstrap)
        self.methods = {
            name: method for name, method in (_methods() | self.methods).items() if method is not None
        }
        if not self.methods:
            raise ValueError("every method is null")
        self._train, self._test = _source(self.train), _source(self.test)
        self._cropped = {
            center: (replace(self._train, center=center), replace(self._test, center=center))
            for center in dict.fromkeys(method.center for method in self.methods.values())
        }

    def check(self) -> None:
        """Find the shards of both sets."""
        check_found(self._train)
        check_found(self._test)

    def run(self, encoder: Encoder) -> Evaluation:
        """Embed both sets, then train and measure every method on all ranks alike. All ranks."""
        names = [class_folder_names(source.shards) for source in (self._train, self._test)]
        if names[0] != names[1] and all(names):
            raise UserError(f"{self._train.shards} and {self._test.shards} have other class folders")
        metrics: dict[str, float] = {}
        details: dict[str, Any] = {}
        for center, sources in self._cropped.items():
            train, test = self._embed(encoder, *sources)
            features = features_of(train, test, encoder.world.device)
            for method in (each for each in self.methods.values() if each.center == center):
                ranks, numbers = method.fit(features)
                for name, repetitions in ranks.items():
                    metrics |= self._metrics(name, [part.cpu() for part in repetitions], features)
                metrics |= numbers
                if "lp" in ranks:
                    details["classes"] = self._by_class(ranks["lp"][0].cpu(), features)
        details["counts"], metrics["n"] = test.counts, float(len(test.keys))
        return Evaluation(metrics, details if encoder.world.is_main else {})

    def _embed(
        self, encoder: Encoder, train: EvaluationSource, test: EvaluationSource
    ) -> tuple[ImageSet, ImageSet]:
        """Embed both sets. All ranks."""
        images = [encoder.encode_images(source, encoder.pool_images) for source in (train, test)]
        both = set(images[0].keys) & set(images[1].keys)
        if train.shards == test.shards and both:
            raise UserError(
                f"{len(both)} samples, such as {min(both)}, are in both train and test: "
                "give them other shards, or a select with held_out and part=held_out for test"
            )
        return images[0], images[1]

    def _metrics(self, name: str, repetitions: list[Tensor], features: Features) -> dict[str, float]:
        labels = features.test_labels.cpu()
        found = [accuracy_metrics(ranks, features.classes, labels) for ranks in repetitions]
        metrics = {metric: sum(each[metric] for each in found) / len(found) for metric in found[0]}
        if self.bootstrap:
            # an image is drawn together with what every repetition made of it
            hits = torch.stack([ranks < 1 for ranks in repetitions]).double().mean(dim=0)
            metrics |= confidence_intervals({"acc1": Share(hits, torch.ones(len(hits)))}, self.bootstrap)
        return {f"{name}_{metric}": value for metric, value in metrics.items()}

    def _by_class(self, ranks: Tensor, features: Features) -> list[dict[str, Any]]:
        shards = self._test.shards
        folder = benchmark_folder(shards)
        names = class_folder_names(shards) or dict(enumerate(folder.classnames or [] if folder else []))
        seen, hits = seen_and_hits(ranks, features.test_labels.cpu())
        return [
            {"name": names.get(label, str(label)), "images": int(count), "recall": hit / count}
            for label, (count, hit) in enumerate(zip(seen.tolist(), hits.tolist(), strict=True))
            if count
        ]


def _source(part: str | Mapping[str, Any]) -> EvaluationSource:
    values: dict[str, Any] = {"shards": part} if isinstance(part, str) else dict(part)
    select = as_selection(values.pop("select", {}))
    if "center" in values:
        raise ValueError("center belongs to a method, not to train or test")
    return EvaluationSource(**{"label": "cls", **values}, select=select)
