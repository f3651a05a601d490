"""`sigmoid_loss_scores`: what each image and each text adds to the loss: for curation and to find hard negatives."""

import torch
from torch import Tensor

from kernels.sigmoid_loss.block import scores_of
from kernels.sigmoid_loss.pairs import PairIds, Scores, check_types, make_pair_ids, make_pairs


def sigmoid_loss_scores(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    positives: int | None = 0,
    ids: PairIds | None = None,
) -> Scores:
    """Sums of the pairwise loss -log sigmoid(z * logit) over all texts of an image, and over all images of a text.

    image_embeddings `[n, E]`, text_embeddings `[m, E]`, used as given; logit_scale: the multiplier exp(t');
    logit_bias: b; each of shape () or (1,). positives: image i matches text i + positives, where there is one; None
    if nothing matches. ids: pairs that are alike and count otherwise.

    Returns images `[n]` and texts `[m]`, not divided by anything, in float32 (float64 for float64 embeddings), without
    gradients. No n x m tensor is made. Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    inputs = (image_embeddings, text_embeddings, logit_scale, logit_bias)
    _check_shapes(image_embeddings, text_embeddings)
    check_types("sigmoid_loss_scores", *inputs)
    if ids is not None:
        ids = make_pair_ids(*ids, inputs[:2])
    with torch.autocast(image_embeddings.device.type, enabled=False):
        return scores_of(*make_pairs(*inputs, ids), positives=positives)


def _check_shapes(images: Tensor, texts: Tensor) -> None:
    is_matrix = images.ndim == texts.ndim == 2 and len(images) > 0 and len(texts) > 0
    if not is_matrix or images.shape[1] != texts.shape[1]:
        raise ValueError(
            "sigmoid_loss_scores: embeddings must be [n, E] and [m, E], n and m at least 1; got images "
            f"{tuple(images.shape)}, texts {tuple(texts.shape)}"
        )
