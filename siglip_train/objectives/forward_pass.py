"""Every encoder output of a batch by name, computed when the first objective asks for it and then shared."""

from functools import cached_property

import torch
from torch import Tensor
from torch.profiler import record_function

from siglip_train.batch import Batch
from siglip_train.errors import UserError
from siglip_train.models.siglip import Siglip, normalize
from siglip_train.models.text import TextFeatures
from siglip_train.models.vision import VisionFeatures


class ForwardPass:
    """The passes of `model` over `batch`. What no objective asks for is never computed.

    All ranks must ask in the same order, as ZeRO-3 gathers weights on the way; objectives run in config order.
    """

    def __init__(self, model: Siglip, batch: Batch) -> None:
        self.model = model
        self.batch = batch

    @cached_property
    def image(self) -> VisionFeatures:
        """The vision tower's tokens `[B, L, D]`, pooled output `[B, D]` and mask."""
        if "pooled" in self.batch.parts:
            raise UserError(
                "an objective needs the images or their tokens, and of a locked tower data.embedding_dir keeps the "
                "pooled output alone: set data.embedding_dir=null, or leave the objective out (objectives.NAME=null)"
            )
        images = self.batch.part("images")
        with record_function("forward/image"):
            return self.model.vision(*images)

    @cached_property
    def text(self) -> TextFeatures:
        """The text tower's tokens `[B, context_length, D]` and pooled output `[B, E]`."""
        texts = self.batch.part("texts")
        with record_function("forward/text"):
            return self.model.text(texts)

    @cached_property
    def image_pooled(self) -> Tensor:
        """The vision tower's pooled output, `[B, D]`: of this pass, or as it was kept."""
        kept = self.batch.parts.get("pooled")
        return self.image.pooled if kept is None else kept.float()

    @cached_property
    def image_average(self) -> Tensor:
        """The average of an image's tokens that are no padding, `[B, D]`."""
        tokens, _, mask = self.image
        if mask is None:
            return tokens.mean(dim=1)
        weights = mask.to(tokens.dtype)[..., None]  # [B, L, 1]
        return (tokens * weights).sum(dim=1) / weights.sum(dim=1)

    @cached_property
    def image_embedding(self) -> Tensor:
        """Images as unit vectors in fp32, `[B, E]`."""
        return _unit(self.image_pooled)

    @cached_property
    def text_embedding(self) -> Tensor:
        """Texts as unit vectors in fp32, `[B, E]`."""
        return _unit(self.text.pooled)


def _unit(pooled: Tensor) -> Tensor:
    # at scale 100 a bf16 rounding of the embedding moves a logit by up to 0.4
    with record_function("forward/normalize"), torch.autocast(pooled.device.type, enabled=False):
        return normalize(pooled)
