"""The training loss on held-out pairs, at a batch size of its own, so that runs of any batch size compare."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels import sigmoid_loss
from siglip_train.data.shards.select import Selection, as_selection
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder, Evaluation
from siglip_train.evals.loader import EvaluationSource, check_found

_LOG = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ValidationLoss:
    """Sigmoid loss with the model's own scale and bias, averaged over blocks of `reference_batch` pairs.

    The loss grows with the number of negatives, hence the fixed block: the value depends neither on the
    training batch nor on the number of ranks. Blocks follow the data order; the remainder is left out.

    reference_batch: pairs in a block; where there are fewer, all of them are one. language: of several captions the
    first of this language is taken; null = the first.
    """

    shards: str | list[str]
    text: str = "txt"
    image: str = EvaluationSource.image
    language: str | None = None
    reference_batch: int = 256
    max_samples: int | None = None
    select: Selection | dict[str, Any] = field(default_factory=Selection)

    def __post_init__(self) -> None:
        """Check ranges and what makes up the source."""
        if self.reference_batch < 1:
            raise ValueError(f"reference_batch must be at least 1, got {self.reference_batch}")
        self._source = EvaluationSource(
            shards=self.shards,
            image=self.image,
            text=self.text,
            max_samples=self.max_samples,
            select=as_selection(self.select),
        )

    def check(self) -> None:
        """Find the shards."""
        check_found(self._source)

    def run(self, encoder: Encoder) -> Evaluation:
        """Embed the pairs and take the loss block by block. All ranks."""
        images = encoder.encode_images(self._source)
        captions = [
            [caption.text for caption in captions if self.language in (None, caption.language)]
            for captions in images.captions
        ]
        rows = [row for row, texts in enumerate(captions) if texts]
        if not rows:
            where = f"{self.shards}" + (f" in language {self.language!r}" if self.language else "")
            raise UserError(f"no pair in {where}")
        block = min(self.reference_batch, len(rows))
        if block < self.reference_batch and encoder.world.is_main:
            # hours into a run is no time for an error
            _LOG.warning(
                "%s holds %d pairs, fewer than reference_batch=%d: the loss is taken among these, and is lower than"
                " among more",
                *(self.shards, block, self.reference_batch),
            )
        rows = rows[: len(rows) // block * block]
        texts = encoder.encode_texts([captions[row][0] for row in rows])
        device = encoder.world.device
        scale, bias = (torch.tensor(value, device=device) for value in encoder.scale_and_bias())
        blocks = zip(
            images.embeddings[rows].to(device).split(block),
            texts.to(device).split(block),
            strict=True,
        )
        parts = torch.stack([loss_parts(*block, scale, bias) for block in blocks]).mean(dim=0)  # [2]
        total, positive = parts.tolist()
        metrics = {"loss": total, "positive_loss": positive, "negative_loss": total - positive}
        return Evaluation(metrics, {"counts": images.counts} if encoder.world.is_main else {})


def loss_parts(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Give the loss of a block and the share of its matching pairs: `[n, E]`, `[n, E]` -> `[2]`."""
    with torch.no_grad():
        total = sigmoid_loss(images, texts, scale, bias)
        logits = scale * (images * texts).sum(dim=-1) + bias  # [n]
        return torch.stack([total, -torch.nn.functional.logsigmoid(logits).mean()])
