"""Classification of images as an objective: a linear head on the vision tower, trained on labels."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

from siglip_train.batch import Batch
from siglip_train.data.inputs.images import ImageInput
from siglip_train.data.inputs.labels import LabelInput
from siglip_train.errors import UserError
from siglip_train.objectives.base import Objective, StepSizes
from siglip_train.objectives.forward_pass import ForwardPass


class Classification(Objective):
    """Cross-entropy of `classifier`, one linear layer, against the labels of the batch.

    classes: C, so that labels are 0..C-1. width: of the vision tower, D. classnames: in label order, kept for exports.
    features: `tokens` = their average, which is what Hugging Face's SiglipForImageClassification reads, `pooled` = what
    the tower's own head makes of them, with which contrastive training ended. label_smoothing: share of the target that
    is spread over all classes.
    """

    inputs = (LabelInput, ImageInput)

    def __init__(
        self,
        *,
        classes: int,
        width: int,
        classnames: Sequence[str] | None = None,
        features: Literal["tokens", "pooled"] = "tokens",
        label_smoothing: float = 0.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        if classes < 2:
            raise ValueError(f"classes is {classes}: give the number of classes, at least 2")
        if features not in ("tokens", "pooled"):
            raise ValueError(f"features is {features!r}: choose tokens or pooled")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}: give a share in 0..1, below 1")
        if classnames is not None and len(classnames) != classes:
            raise ValueError(f"classes is {classes}, and there are {len(classnames)} classnames")
        self.classes, self.label_smoothing = classes, label_smoothing
        self.classnames = None if classnames is None else list(classnames)
        self.features = features
        self.classifier = nn.Linear(width, classes)
        # all classes equally likely at first, so that the tower is not moved by a random head
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def logits(self, forward_pass: ForwardPass) -> Tensor:
        """Scores of the classes, `[B, C]` in fp32."""
        is_pooled = self.features == "pooled"
        features = forward_pass.image_pooled if is_pooled else forward_pass.image_average  # [B, D]
        return self.classifier(features).float()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count this rank's images. Raises `UserError` for a label outside 0..C-1.

        Here and not in `forward`, as labels are still on the host when a step counts: asking a GPU would wait for it.
        """
        labels = batch.part("labels")
        outside = ((labels < 0) | (labels >= self.classes)).nonzero().flatten()
        if len(outside):
            row = int(outside[0])
            raise UserError(
                f"label {int(labels[row])} of sample {batch.keys[row]}: the objective has {self.classes} classes, so "
                f"labels are 0..{self.classes - 1}"
            )
        return {"images": batch.size}

    def flops_per_sample(self, sizes: StepSizes) -> float:  # noqa: ARG002
        """Three products with the classifier's weights."""
        return 6.0 * self.classifier.in_features * self.classifier.out_features

    def forward(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        """Return the sum over this rank's images. Labels are in 0..C-1, as `counts` has seen."""
        logits = self.logits(forward_pass)
        with record_function("objective/classification"):
            loss = functional.cross_entropy(
                logits,
                forward_pass.batch.part("labels"),
                label_smoothing=self.label_smoothing,
                reduction="sum",
            )
        return {"images": loss}
