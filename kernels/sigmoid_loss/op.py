"""`sigmoid_loss`: checks, autograd, and the choice between one process and an exchange with other ranks."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.products import dtype_of_products
from kernels.sigmoid_loss.block import gradients_of, value_of
from kernels.sigmoid_loss.exchange.agreement import agree
from kernels.sigmoid_loss.exchange.all_gather import gather_gradients, gather_value
from kernels.sigmoid_loss.exchange.choose import AUTO, Exchange, narrowed
from kernels.sigmoid_loss.exchange.grid import grid_gradients, grid_through, grid_value
from kernels.sigmoid_loss.exchange.ring import ring_gradients, ring_value
from kernels.sigmoid_loss.exchange.route import Route, flat_route, node_route
from kernels.sigmoid_loss.pairs import (
    BlockGradients,
    Embeddings,
    Pairs,
    check_types,
    make_pair_ids,
    make_pairs,
)


def sigmoid_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id_weight: float = 0.0,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = AUTO,
    compute_dtype: torch.dtype | None = None,
    is_agreed: bool = False,
) -> Tensor:
    """Sigmoid loss of SigLIP (section 3.2): sum over all texts, mean over this rank's images.

    image_embeddings, text_embeddings: `[B, E]`, row i of one matches row i of the other. They are used as given:
    normalise them first. logit_scale: the multiplier exp(t'); logit_bias: b; each of shape () or (1,).
    image_ids, text_ids: integers `[B]`, both or neither. A pair off the diagonal with equal ids (duplicate captions or
    images, several captions of an image) counts same_id_weight times: 0 leaves it out, 1 is as without ids. Negative
    ids match nothing. On several ranks, ids have one meaning for all.
    group: the ranks whose texts are negatives too; all of them must call this together, with equal shapes. None =
    this rank alone. exchange: how texts meet the images of other ranks; by default what the cost model finds fastest.
    compute_dtype: what embeddings are rounded to, once, before they are multiplied and sent: float16, bfloat16 or
    float32; None = float16 for float32 embeddings under a 16-bit autocast, else their own. Give them in float32:
    gradients come back in it. float16 holds unit vectors eight times as well as bfloat16, and ends at 65504.
    is_agreed: by default the ranks ask one another in each call whether they call alike, and the CPU waits for the
    answer. True = they do, as in a loop whose first call has asked: nobody waits, and a rank that differs after all
    hangs the others.

    Returns a scalar in float32 (float64 for float64 embeddings), differentiable once in all four inputs. Gradients
    are made here and scaled in backward, so the upstream gradient must be the same on all ranks, as it is in data
    parallel training. There, the mean over ranks of every parameter's gradient is that of the global batch.
    Sums are in float32 or better whatever the input, and logits are never rounded to 16 bits.

    Raises ValueError for shapes, dtypes and devices that do not fit, on all ranks if on one; RuntimeError for a second
    derivative.
    """
    inputs = (image_embeddings, text_embeddings, logit_scale, logit_bias)
    # what is multiplied and sent; gradients go to what was given, without a rounding on the way
    rounded, ids, refusal = inputs[:2], None, None
    try:
        _check(*inputs, exchange)
        dtype = dtype_of_products(image_embeddings, compute_dtype)
        with torch.no_grad():
            rounded = image_embeddings.to(dtype), text_embeddings.to(dtype)
        ids = make_pair_ids(image_ids, text_ids, same_id_weight, inputs[:2])
    except ValueError as error:
        if group is None:
            raise
        refusal = error  # told when the other ranks have heard of it
    gradients = refusal is None and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    peers = None
    if group is not None:
        exchange = agree(
            exchange,
            rounded[0],
            group,
            gradients=gradients,
            ids=ids,
            refusal=refusal,
            is_agreed=is_agreed,
        )
        peers = _Peers(group, exchange) if dist.get_world_size(group) > 1 else None
    with torch.autocast(image_embeddings.device.type, enabled=False):
        work = make_pairs(*rounded, *inputs[2:], ids)
        if gradients:
            return _SigmoidLoss.apply(*inputs, work, peers)
        loss = _value_over_ranks(*work, *peers) if peers else value_of(*work, positives=0)
        return (loss / len(image_embeddings)).to(_result_dtype(image_embeddings))


class _Peers(NamedTuple):
    """The other ranks, and how they are reached."""

    group: dist.ProcessGroup
    exchange: Exchange


def _result_dtype(images: Tensor) -> torch.dtype:
    return torch.promote_types(images.dtype, torch.float32)


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        work: tuple[Embeddings, Embeddings, Pairs],
        peers: _Peers | None,
    ) -> Tensor:
        sums = _gradients_over_ranks(*work, *peers) if peers else gradients_of(*work, positives=0)
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in (images, texts, scale, bias)]
        ctx.save_for_backward(*(part.div_(len(images)) for part in sums[1:]))
        return (sums.loss / len(images)).to(_result_dtype(images))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # grad mode is on here only under create_graph=True
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sigmoid_loss has no second derivative: call backward without create_graph=True, "
                "or differentiate kernels.sigmoid_loss.reference"
            )
        gradients = [
            (upstream * saved).to(dtype).reshape(shape) if needed else None
            for saved, (shape, dtype), needed in zip(
                ctx.saved_tensors, ctx.like, ctx.needs_input_grad[:4], strict=True
            )
        ]
        return (*gradients, None, None)


def _gradients_over_ranks(
    images: Embeddings, texts: Embeddings, pairs: Pairs, group: dist.ProcessGroup, exchange: Exchange
) -> BlockGradients:
    """Sums over this rank's `[n, E]` images and all texts, by what `choose_exchange` gave.  # all ranks of group

    The gradients of images, scale and bias are of this rank's loss; that of its texts is of the sum over ranks.
    """
    texts = _as_sent(texts, exchange)
    if exchange.form == "all_gather":
        return gather_gradients(images, texts, pairs, group, exchange.dtype)
    if exchange.grid is not None:
        grid = grid_through(group, exchange.grid[0], exchange.ranks_per_node or 1, exchange.dtype)
        return grid_gradients(_as_sent(images, exchange), texts, pairs, grid)
    return ring_gradients(images, texts, pairs, _route(group, exchange))


def _value_over_ranks(
    images: Embeddings, texts: Embeddings, pairs: Pairs, group: dist.ProcessGroup, exchange: Exchange
) -> Tensor:
    """The loss of `_gradients_over_ranks` alone, float64, shape ().  # all ranks of group"""
    texts = _as_sent(texts, exchange)
    if exchange.form == "all_gather":
        return gather_value(images, texts, pairs, group)
    if exchange.grid is not None:
        grid = grid_through(group, exchange.grid[0], exchange.ranks_per_node or 1, exchange.dtype)
        return grid_value(_as_sent(images, exchange), texts, pairs, grid)
    return ring_value(images, texts, pairs, _route(group, exchange))


def _route(group: dist.ProcessGroup, exchange: Exchange) -> Route:
    members = range(dist.get_world_size(group))
    per_node = exchange.ranks_per_node or 1
    rings = (
        node_route(group, members, per_node) if exchange.form == "node_ring" else flat_route(group, members)
    )
    return Route(rings, exchange.dtype)


def _as_sent(block: Embeddings, exchange: Exchange) -> Embeddings:
    """A block as it travels, contiguous; rounded at home too, so that all ranks see the same."""
    vectors = block.vectors
    if narrowed(vectors.element_size(), exchange.dtype) < vectors.element_size():
        vectors = vectors.to(exchange.dtype)
    return Embeddings(*(tensor.contiguous() for tensor in block._replace(vectors=vectors).tensors))


def _check(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, exchange: Exchange) -> None:
    check_types("sigmoid_loss", images, texts, scale, bias)
    if images.ndim != 2 or images.shape != texts.shape or images.numel() == 0:
        raise ValueError(
            "sigmoid_loss: embeddings must be two [B, E] tensors of one shape, B and E at least 1; got images "
            f"{tuple(images.shape)}, texts {tuple(texts.shape)}"
        )
    if not isinstance(exchange, Exchange):
        raise ValueError(
            f"sigmoid_loss: exchange must be an Exchange, such as Exchange('ring'); got {exchange!r}"
        )
