"""`prototype_cross_entropy`: the loss and its gradients a chunk of rows at a time, on any device."""

from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.products import dtype_of_products, multiply

# For the logits of a chunk, the student's and the teacher's. On a GPU the gradient of the prototypes, which every chunk
# adds to, would take a large share of the time with less (as in linear_cross_entropy).
BUFFER_MIB = {"cpu": 64, "cuda": 1024}
# fp16 ends at 6e-8, while a share of one prototype among 32k is 3e-5: with this factor it keeps its digits
_UNIT = {torch.float16: 1024}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Temperatures(NamedTuple):
    """What logits are divided by before the softmax; the lower the teacher's, the sharper its choice (DINO)."""

    student: float = 0.1
    teacher: float = 0.04


class PrototypeSums(NamedTuple):
    """loss: the weighted sum over all rows and views. logits, shares: sums `[K]` over the teacher's R rows.

    logits are those before centring, whose mean is what the centre follows. shares sum to R: they say which prototypes
    the teacher uses. Both are detached.
    """

    loss: Tensor
    logits: Tensor
    shares: Tensor


def prototype_cross_entropy(
    student: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    centre: Tensor,
    *,
    temperatures: Temperatures = Temperatures(),  # noqa: B008  # immutable
    weights: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> PrototypeSums:
    """-sum_k softmax((teacher w'_k - centre_k) / t_teacher) log softmax(student w_k / t_student), summed over views.

    The self-distillation loss of DINO (arXiv 2104.14294, section 3.1) and SILC, over K prototypes, without a tensor of
    R x V x K or R x K.

    student: `[R, V, D]`, the V views that are compared with each of the teacher's rows. prototypes: `[K, D]`. teacher:
    `[R, D]`. teacher_prototypes: `[K, D]`. centre: `[K]`. weights: `[R, V]`, how much a view counts, no gradient; None
    = 1 each. compute_dtype: what the factors of products are rounded to; None = fp16 under a 16-bit autocast, else
    their own.

    The softmax and all sums are in float32, or float64 for float64 input. Differentiable once, in student and
    prototypes: the gradients are made here and scaled in backward. Raises ValueError for shapes and dtypes that do not
    fit, RuntimeError for a second derivative.
    """
    weights = student.new_ones(student.shape[:2]) if weights is None else weights
    _check(student, prototypes, teacher, teacher_prototypes, centre, weights)
    targets = _Targets(
        teacher.detach(),
        teacher_prototypes.detach(),
        centre.detach(),
        weights,
        temperatures,
        dtype_of_products(student, compute_dtype),
    )
    with torch.autocast(student.device.type, enabled=False):
        return PrototypeSums(*_Sums.apply(student, prototypes, targets))


class _Targets(NamedTuple):
    teacher: Tensor
    prototypes: Tensor
    centre: Tensor
    weights: Tensor
    temperatures: Temperatures
    compute_dtype: torch.dtype


class _Sums(torch.autograd.Function):
    """The sums, with the gradients of the loss made in forward."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, prototypes: Tensor, targets: _Targets
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = [
            torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32))
            if is_wanted
            else None
            for each, is_wanted in zip((student, prototypes), ctx.needs_input_grad, strict=False)
        ]
        sums = _go_through(student, prototypes, targets, *gradients)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = student.dtype, prototypes.dtype
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # grad mode is on in backward only under create_graph=True
        if torch.is_grad_enabled():
            raise RuntimeError(
                "prototype_cross_entropy has no second derivative: call backward without create_graph=True, or "
                "differentiate kernels.prototype_cross_entropy.reference"
            )
        gradients = [
            None if saved is None else torch.mul(saved, upstream, out=torch.empty_like(saved, dtype=dtype))
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None)


def _go_through(
    student: Tensor,
    prototypes: Tensor,
    targets: _Targets,
    d_student: Tensor | None,
    d_prototypes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradients of the loss to those given; return loss, sum of logits and sum of shares."""
    rows, views, width = student.shape
    count, dtype = len(prototypes), targets.compute_dtype
    total = torch.promote_types(dtype, torch.float32)
    # G has values of about one whatever the weights, so that 16 bits hold it; the rest is put back at the end
    largest = targets.weights.abs().amax().to(total) if rows else student.new_ones((), dtype=total)
    largest = torch.where(largest > 0, largest, 1)
    unit = _UNIT.get(dtype, 1)
    weights = targets.weights.to(total) / largest
    student, prototypes = student.to(dtype), prototypes.to(dtype)
    teacher, teacher_prototypes = targets.teacher.to(dtype), targets.prototypes.to(dtype)
    loss = student.new_zeros((), dtype=torch.float64)
    logit_sum, share_sum = student.new_zeros(2, count, dtype=total)
    step = choose_rows(rows, (views + 1) * count * total.itemsize, student.device)
    buffer = student.new_empty(min(step, rows) * (views + 1), count, dtype=total)
    for start in range(0, rows, step):
        of_teacher = teacher[start : start + step]
        now = len(of_teacher)
        chunk = student[start : start + now].reshape(-1, width)  # [r V, D]
        wanted, logits = buffer[:now], buffer[now : now * (views + 1)]
        multiply(of_teacher, teacher_prototypes.T, out=wanted, keep=0)
        logit_sum += wanted.sum(0)
        torch.softmax(wanted.sub_(targets.centre).div_(targets.temperatures.teacher), dim=1, out=wanted)
        share_sum += wanted.sum(0)
        multiply(chunk, prototypes.T, out=logits, keep=0)
        logits.div_(targets.temperatures.student)
        by_view = logits.view(now, views, count)
        at_targets = torch.bmm(by_view, wanted[:, :, None]).squeeze(2)  # [r, V], as the targets sum to 1
        losses = logits.logsumexp(1).view(now, views) - at_targets
        loss += (losses * weights[start : start + now]).sum(dtype=torch.float64)
        if d_student is None and d_prototypes is None:
            continue
        torch.softmax(logits, dim=1, out=logits)
        factors = weights[start : start + now, :, None] * (unit / targets.temperatures.student)
        by_view.sub_(wanted[:, None]).mul_(factors)  # G
        slopes = logits.to(dtype)
        if d_student is not None:
            multiply(slopes, prototypes, out=d_student[start : start + now].view(-1, width), keep=0)
        if d_prototypes is not None:
            multiply(slopes.T, chunk, out=d_prototypes, keep=1)
    for gradient in (d_student, d_prototypes):
        if gradient is not None:
            gradient.mul_(largest / unit)
    return (loss * largest).to(total), logit_sum, share_sum


def choose_rows(rows: int, bytes_per_row: int, device: torch.device) -> int:
    """Rows of the teacher in a chunk: what the buffer has room for, at least 16, and about as many in every chunk."""
    most = max(16, BUFFER_MIB.get(device.type, BUFFER_MIB["cuda"]) * 2**20 // bytes_per_row)
    return max(1, ceil(rows / max(1, ceil(rows / most))))


def _check(
    student: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    centre: Tensor,
    weights: Tensor,
) -> None:
    shapes = [
        tuple(each.shape) for each in (student, prototypes, teacher, teacher_prototypes, centre, weights)
    ]
    rows, views, width = student.shape if student.ndim == 3 else (-1, -1, -1)
    count = len(prototypes)
    if shapes != [
        (rows, views, width), (count, width), (rows, width), (count, width), (count,), (rows, views)
    ] or not count or not views:  # fmt: skip
        raise ValueError(
            "prototype_cross_entropy: student must be [R, V, D], prototypes [K, D], teacher [R, D], teacher_prototypes "
            f"[K, D], centre [K] and weights [R, V], K and V at least 1; got {', '.join(map(str, shapes))}"
        )
    dtypes = [each.dtype for each in (student, prototypes, teacher, teacher_prototypes)]
    if any(dtype not in _FLOATS for dtype in dtypes) or 0 < dtypes.count(torch.float64) < len(dtypes):
        raise ValueError(
            "prototype_cross_entropy: inputs must be floating-point, float64 all or none; got "
            + ", ".join(map(str, dtypes))
        )
    if weights.requires_grad:
        raise ValueError("prototype_cross_entropy: weights must need no gradient")
