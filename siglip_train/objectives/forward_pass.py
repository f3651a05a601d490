"""Every encoder output of a batch by name, computed when the first objective asks for it and then shared."""

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from siglip_train.batch import Batch
from siglip_train.errors import UserError
from siglip_train.models.siglip import Siglip, normalize
from siglip_train.models.text import TextFeatures
from siglip_train.models.vision import VisionFeatures


class ForwardPass:
    """The passes of `model` over `batch`. What no objective asks for is never computed.

    All ranks must ask in the same order, as ZeRO-3 gathers weights on the way; objectives run in config order.
    copies: the teacher's, by the modules that they follow.
    """

    def __init__(
        self, model: Siglip, batch: Batch, copies: Mapping[nn.Module, nn.Module] = MappingProxyType({})
    ) -> None:
        self.model = model
        self.batch = batch
        self._copies = copies

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
    def local_views(self) -> VisionFeatures:
        """The vision tower on all local views at once, image by image: tokens `[B V, l, D]`, pooled `[B V, D]`."""
        patches, grid, _ = self.batch.part("views").local
        with record_function("forward/local_views"):
            return self.model.vision(patches.flatten(0, 1), grid.flatten(0, 1))

    @cached_property
    def teacher(self) -> VisionFeatures:
        """What the teacher makes of the global view, without gradients: tokens `[B, L, D]`, pooled `[B, D]`."""
        # by its scope it may have heads alone; its tower is then the student's (TIPSv2)
        tower = self._copies.get(self.model.vision, self.model.vision)
        with record_function("forward/teacher"), torch.no_grad():
            return tower(*self.batch.part("views").whole)

    def teacher_of(self, student: nn.Module) -> nn.Module:
        """The teacher's copy of a module that an objective names in `averaged`. Call it under `torch.no_grad`."""
        return self._copies[student]

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
