"""Accuracy of a classification head on labelled shards: inside the run that trains it, or of a checkpoint."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from siglip_train.batch import Batch, Images
from siglip_train.data.shards.select import Selection, as_selection
from siglip_train.errors import UserError
from siglip_train.evals.accuracy import accuracy_metrics
from siglip_train.evals.base import Encoder, Evaluation
from siglip_train.evals.features import single_labels
from siglip_train.evals.loader import EvaluationSource, check_found
from siglip_train.evals.ranking import best_ranks
from siglip_train.objectives.classification import Classification
from siglip_train.objectives.forward_pass import ForwardPass


@dataclass(kw_only=True)
class HeadAccuracy:
    """acc1, acc5 (from 5 classes on) and mean_per_class_recall of a head, under CLIP_benchmark's names.

    objective: the head's name below `objectives`. label: member or `json:field` with the class index.
    """

    shards: str | list[str]
    objective: str = "classification"
    image: str = EvaluationSource.image
    label: str = "cls"
    max_samples: int | None = None
    select: Selection | dict[str, Any] = field(default_factory=Selection)

    def __post_init__(self) -> None:
        """Check what makes up the source."""
        self._source = EvaluationSource(
            shards=self.shards,
            image=self.image,
            label=self.label,
            max_samples=self.max_samples,
            select=as_selection(self.select),
        )

    def check(self) -> None:
        """Find the shards."""
        check_found(self._source)

    def run(self, encoder: Encoder) -> Evaluation:
        """Classify every image. All ranks."""
        head = self._head(encoder)

        def scores(images: Images) -> Tensor:
            return head.logits(ForwardPass(encoder.model, Batch({"images": images})))  # [B, C]

        images = encoder.encode_images(
            self._source,
            scores,
        )
        labels = single_labels(images)
        outside = ((labels < 0) | (labels >= head.classes)).nonzero().flatten().tolist()
        if outside:
            raise UserError(
                f"label {int(labels[outside[0]])} of sample {images.keys[outside[0]]}: the objective "
                f"{self.objective} has {head.classes} classes, so labels are 0..{head.classes - 1}"
            )
        # a class is where its score stands: the scores times the identity are the scores
        ranks = best_ranks(images.embeddings, torch.eye(head.classes), labels, torch.arange(head.classes))
        metrics = accuracy_metrics(ranks, head.classes, labels)
        metrics["n"] = float(len(labels))
        return Evaluation(metrics, {"counts": images.counts} if encoder.world.is_main else {})

    def _head(self, encoder: Encoder) -> Classification:
        head = encoder.heads.get(self.objective)
        if not isinstance(head, Classification):
            raise UserError(
                f"there is no classification head named {self.objective} here: this task measures one of a run with "
                "+objective@objectives.NAME=classification, or of a checkpoint inside it"
            )
        return head
