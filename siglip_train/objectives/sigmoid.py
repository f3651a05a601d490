"""The sigmoid loss of SigLIP as an objective, over the texts of all ranks."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.profiler import record_function

from kernels import sigmoid_loss
from siglip_train.batch import Batch
from siglip_train.data.inputs.base import Input
from siglip_train.data.inputs.captions import CaptionInput, TextPresenceInput
from siglip_train.data.inputs.images import ImageInput
from siglip_train.distributed.collectives import add_over_ranks
from siglip_train.distributed.ring import Ring
from siglip_train.objectives.base import Objective
from siglip_train.objectives.forward_pass import ForwardPass

_COMPUTE_DTYPES = {"auto": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_HASH_BASE = 0x9E3779B97F4A7C15  # odd, with its bits well mixed


class SigmoidLoss(Objective):
    """Every image against every text of the global batch, matched or not (SigLIP, section 3.2).

    Samples of sources without texts (`text: null`) take no part: the sum goes over the pairs of the others, and its
    mean over their images.

    exchange, exchange_dtype: how texts meet the images of other ranks (`Ring`). same_text_weight: how often an image
    counts against another sample's text that has the same tokens as its own, and so is none of its negatives; 0 leaves
    such pairs out, 1 (as published) treats them as all others. compute_dtype: what unit embeddings are rounded to
    before they are multiplied and sent; auto is fp16 in bf16 training (assumption: towers round more), else fp32.
    Raises ValueError for other values, and for a form that does not fit the number of ranks, where there are several.
    """

    inputs: tuple[type[Input], ...] = (CaptionInput, TextPresenceInput, ImageInput)
    pairs_samples = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        exchange: str = "auto",
        exchange_dtype: Literal["fp32", "bf16"] = "fp32",
        same_text_weight: float = 1.0,
        compute_dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto",
    ) -> None:
        super().__init__(weight=weight)
        if compute_dtype not in _COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype is {compute_dtype!r}: choose {', '.join(_COMPUTE_DTYPES)}")
        if not (isinstance(same_text_weight, (int, float)) and 0 <= same_text_weight < math.inf):
            raise ValueError(f"same_text_weight is {same_text_weight!r}: give a number of at least 0")
        self._same_text_weight = same_text_weight
        self._compute_dtype = _COMPUTE_DTYPES[compute_dtype]
        self._ring = Ring(exchange, exchange_dtype)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count this rank's images that have a text."""
        has_text = batch.parts.get(TextPresenceInput.part)
        return {"images": batch.size if has_text is None else int(has_text.sum())}

    def forward(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        """Return the sum over this rank's images and the texts of all ranks.  # all ranks"""
        model = forward_pass.model
        images, texts = forward_pass.image_embedding, forward_pass.text_embedding
        ids = None if self._same_text_weight == 1 else text_ids(forward_pass.batch.part("texts"))
        has_text = forward_pass.batch.parts.get(
            TextPresenceInput.part
        )  # [B] bool, the same part on all ranks
        if has_text is not None:
            images, texts = (torch.where(has_text[:, None], each, 0) for each in (images, texts))
            ids = None if ids is None else torch.where(has_text, ids, -1)
        with record_function("objective/sigmoid"):
            mean = sigmoid_loss(
                images,
                texts,
                model.logit_scale.exp(),
                model.logit_bias,
                image_ids=ids,
                text_ids=ids,
                same_id_weight=self._same_text_weight,
                group=self._ring.group(images, has_ids=ids is not None, compute_dtype=self._compute_dtype),
                exchange=self._ring.exchange,
                compute_dtype=self._compute_dtype,
                is_agreed=self._ring.is_agreed(images, has_ids=ids is not None),
            )
        total = mean * len(images)
        return {"images": total if has_text is None else _of_texts(total, has_text, model.logit_bias)}


def _of_texts(total: Tensor, has_text: Tensor, bias: Tensor) -> Tensor:
    """The sum without pairs of samples that have no text, whose embeddings are zeros.  # all ranks

    The logit of such a pair is the bias alone, so that nothing but the bias gets a gradient of it, and what all of them
    have added is known: every rank computes blocks of one size, however many of its samples have a text.
    """
    mine, rows = has_text.sum().double(), len(has_text)
    everywhere = add_over_ranks(torch.stack([mine, torch.full_like(mine, rows)]))
    pairs = rows * everywhere[1] - mine * everywhere[0]
    matches = rows - mine
    logit = bias.double().squeeze()
    added = (pairs - matches) * softplus(logit) + matches * softplus(-logit)
    # of no pairs at all nothing shall remain, not even what was rounded off
    return torch.where(everywhere[0] > 0, total - added, 0 * total).to(total.dtype)


def text_ids(tokens: Tensor) -> Tensor:
    """A number for each text: tokens `[B, context_length]` -> `[B]` int64, not negative; equal for equal tokens.

    A polynomial modulo 2^63, so that ranks compare numbers and not tokens: among a million different texts, two share
    one with a chance of 1e-7.
    """
    powers = [pow(_HASH_BASE, place, 1 << 64) for place in range(tokens.shape[1])]
    signed = [power - (1 << 64) if power >= 1 << 63 else power for power in powers]
    return ((tokens + 1) * torch.tensor(signed, device=tokens.device)).sum(1) & ((1 << 63) - 1)


def expected_initial_loss(global_batch_size: int, bias: float = -10.0) -> float:
    """Loss that an untrained model should start near, for the user to compare with the first one logged.

    Logits of unrelated unit vectors lie round `bias`, so an image pays softplus(-bias) for its own text and
    softplus(bias) for each other one: 11.5 for a batch of 32768. The spread of the cosines is left out.
    """
    return _softplus(-bias) + (global_batch_size - 1) * _softplus(bias)


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
