"""The sigmoid loss, forward and backward, against its peers and against bare matrix products.

The products alone ("products": the three of 2 n^2 E operations that any exact form needs, in the same run) are the
ceiling: a contestant's share of it is the time of the products over its own. Memory is the peak beside the inputs.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from drawing import drawn
from harness import (
    Row,
    cuda_memory_mb,
    finish,
    measure,
    peak_resident_memory,
    rows,
    run_child,
    shares_of_products,
    timed,
)
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from kernels import sigmoid_loss
from kernels.dispatch import force
from kernels.sigmoid_loss.reference import sigmoid_loss_reference
from kernels.testing import rms_ratio

# (n, E, dtype): the largest only for those whose memory is not quadratic
CASES = {
    "cpu": [
        (1024, 768, "float32"), (4096, 768, "float32"), (4096, 768, "bfloat16"), (8192, 768, "float32"),
        (8192, 768, "bfloat16"), (16384, 768, "float32"), (16384, 768, "bfloat16"),
    ],
    "cuda": [
        (1024, 768, "bfloat16"), (1024, 1152, "bfloat16"), (4096, 768, "bfloat16"), (4096, 1152, "bfloat16"),
        (8192, 768, "float32"), (16384, 768, "bfloat16"), (32768, 768, "bfloat16"), (32768, 1152, "bfloat16"),
        (131072, 768, "bfloat16"), (131072, 1152, "bfloat16"), (1048576, 768, "bfloat16"), (1048576, 1152, "bfloat16"),
    ],
}  # fmt: skip
DENSE_ROWS = 32768  # above, n x n logits and what autograd keeps of them do not fit
PEER_ROWS = {"cpu": 8192, "cuda": DENSE_ROWS}  # above, only the forms that people train with
LARGE_ROWS = {"cpu": 4096, "cuda": 131072}  # above, one contestant takes many seconds: fewer rounds
BLOCK = 4096
ACCURACY_ROWS = {"cpu": 1024, "cuda": 8192}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def in_chunks(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, *, rows: int, again: bool
) -> Tensor:
    """open_clip's loss in blocks of rows x rows, as on many ranks; again: each is computed anew in backward.

    The releases that can be installed (3.3) have no chunks of their own.
    """
    blocks, peer = max(1, len(images) // rows), SigLipLoss()
    run = partial(checkpoint, peer._loss, use_reentrant=False) if again else peer._loss
    total = torch.zeros((), device=images.device)
    for row, image in enumerate(images.chunk(blocks)):
        for column, text in enumerate(texts.chunk(blocks)):
            total = total + run(image, text, scale, bias, negative_only=row != column)
    return total / blocks


class Recompute(torch.autograd.Function):
    """The design of DINOv3's memory-efficient loss, for sigmoid: keep the embeddings, make each block twice.

    10 n^2 E operations instead of 6; fp32 in blocks, products in the dtype of the embeddings.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """Sum the losses of the blocks."""
        ctx.save_for_backward(images, texts, scale, bias)
        loss = torch.zeros((), device=images.device)
        for row, image in enumerate(images.split(BLOCK)):
            for column, text in enumerate(texts.split(BLOCK)):
                logits = (image @ text.T).float() * scale + bias
                if row == column:
                    logits.diagonal().neg_()
                loss += torch.nn.functional.softplus(logits).sum()
        return loss / len(images)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Make the blocks again, and of each its share of all gradients."""
        images, texts, scale, bias = ctx.saved_tensors
        d_images, d_texts = (torch.zeros_like(part, dtype=torch.float32) for part in (images, texts))
        d_scale, d_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        for row, (image, d_image) in enumerate(zip(images.split(BLOCK), d_images.split(BLOCK), strict=True)):
            for column, (text, d_text) in enumerate(
                zip(texts.split(BLOCK), d_texts.split(BLOCK), strict=True)
            ):
                cosines = (image @ text.T).float()
                g = torch.sigmoid(cosines * scale + bias)
                if row == column:
                    g.diagonal().sub_(1)
                d_scale += (g * cosines).sum()
                d_bias += g.sum()
                g = g.to(image.dtype)
                d_image += g @ text
                d_text += g.T @ image
        slope = slope / len(images)
        d_images, d_texts = (
            (part * (slope * scale)).to(like.dtype) for part, like in ((d_images, images), (d_texts, texts))
        )
        return d_images, d_texts, d_scale * slope, d_bias * slope


def by_inf_cl(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Inf-CLIP's kernel in both directions: another loss (softmax), whose memory is the question."""
    from inf_cl import cal_flash_loss

    forth, back = (cal_flash_loss(*pair, scale=scale) for pair in ((images, texts), (texts, images)))
    return (forth.mean() + back.mean()) / 2 + 0 * bias


def under_autocast(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's loss as in its training loop: fp32 embeddings, products in bf16."""
    with torch.autocast(images.device.type, torch.bfloat16):
        return SigLipLoss()(images.float(), texts.float(), scale, bias)


def by_chunks(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """This project's form in torch alone, which a CPU runs."""
    with force("chunked"):
        return sigmoid_loss(images, texts, scale, bias)


def by_triton(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """This project's kernel, whatever its self-check says."""
    with force("triton"):
        return sigmoid_loss(images, texts, scale, bias)


def contestants(n: int, dtype: str, device: torch.device) -> dict[str, Loss]:
    """Those that fit a case, by name."""
    chosen: dict[str, Loss] = {"ours": by_triton if device.type == "cuda" else by_chunks}
    is_cuda = device.type == "cuda"
    if is_cuda and n <= LARGE_ROWS["cuda"]:
        chosen["ours in torch"] = by_chunks
    if n <= DENSE_ROWS:
        chosen |= {"open_clip": SigLipLoss(), "open_clip compiled": torch.compile(SigLipLoss())}
        if dtype == "bfloat16":
            chosen["open_clip autocast"] = under_autocast
    if n <= PEER_ROWS[device.type]:
        rows = min(BLOCK, n // 4)
        chosen |= {
            "reference": sigmoid_loss_reference,
            "open_clip chunks": partial(in_chunks, rows=rows, again=False),
        }
        if dtype == "bfloat16":
            chosen["open_clip autocast compiled"] = torch.compile(under_autocast)
        if is_cuda and find_spec("inf_cl") is not None:
            chosen["inf_cl (softmax)"] = by_inf_cl
    if n <= (LARGE_ROWS["cuda"] if is_cuda else PEER_ROWS["cpu"]):
        chosen["open_clip chunks, checkpoint"] = partial(in_chunks, rows=min(BLOCK, n // 4), again=True)
        chosen["recompute"] = Recompute.apply
    return chosen


def draw_inputs(n: int, width: int, dtype: str, device: torch.device) -> list[Tensor]:
    """Correlated unit vectors at the scale and bias of a trained model, where hard pairs exist."""
    generator = torch.Generator(device).manual_seed(0)
    images, noise = (torch.randn(n, width, generator=generator, device=device) for _ in range(2))
    embeddings = [normalize(part, dim=-1).to(getattr(torch, dtype)) for part in (images, images + 3 * noise)]
    return [*embeddings, *(torch.tensor(value, device=device) for value in (117.0, -16.5))]


def differentiate(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    """The loss and its four gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def products(inputs: list[Tensor]) -> None:
    """The three products in chunks, with one buffer."""
    images, texts = inputs[:2]
    size = min(len(images), BLOCK)
    buffer = images.new_empty(size, len(texts))
    for chunk in images.split(size):
        part = torch.mm(chunk, texts.T, out=buffer[: len(chunk)])
        torch.mm(part, texts)
        torch.mm(part.T, chunk)


def probe(index: int, name: str) -> float:
    """On CPU: the peak of a process of its own, beside that of one that only has the inputs."""
    values = [run_child([__file__, "--probe", str(index), other]).split()[-1] for other in (name, "nothing")]
    return float(values[0]) - float(values[1])


def those_that_run(losses: dict[str, Loss], inputs: list[Tensor], notes: list[str]) -> dict[str, Loss]:
    """Leave out, with a note, peers that this machine or their release cannot run; ours must."""
    found = {}
    for name, loss in losses.items():
        try:
            differentiate(loss, inputs)
        except Exception as error:
            if name == "ours":
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            notes.append(f"{name} does not run at n{len(inputs[0])} E{inputs[0].shape[1]}: {reason}")
        else:
            found[name] = loss
    return found


def compare(index: int, device: torch.device, rounds: int, notes: list[str]) -> list[Row]:
    """All contestants of one case, interleaved."""
    n, width, dtype = CASES[device.type][index]
    inputs = draw_inputs(n, width, dtype, device)
    losses = those_that_run(contestants(n, dtype, device), inputs, notes)
    runs: dict[str, Callable[[], object]] = {
        name: partial(differentiate, loss, inputs) for name, loss in losses.items()
    }
    runs["products"] = partial(products, inputs)
    timers = {name: partial(timed, run, device) for name, run in runs.items()}
    if n > LARGE_ROWS[device.type]:
        measurements = measure(timers, rounds=min(rounds, 4 if n <= DENSE_ROWS else 2), warmup=0)
    else:
        measurements = measure(timers, rounds=rounds, warmup=2)
    if device.type == "cuda":
        memory = {name: cuda_memory_mb(runs[name]) for name in losses}
    else:  # of a compiled one, the peak is that of the compiler
        memory = {name: probe(index, name) for name in losses if not name.endswith("compiled")}
    return rows("sigmoid_loss", f"n{n} E{width} {dtype}", "ms/loss", measurements, memory)


def accuracy(width: int, dtype: str, device: torch.device) -> list[str]:
    """Errors against float64 on the same inputs, as notes."""
    n = ACCURACY_ROWS[device.type]
    inputs = draw_inputs(n, width, dtype, device)
    truth = differentiate(sigmoid_loss_reference, [tensor.double() for tensor in inputs])
    notes: list[str] = []
    for name, loss in those_that_run(contestants(n, dtype, device), inputs, notes).items():
        if name.startswith("inf_cl"):
            continue
        result = differentiate(loss, inputs)
        errors = [
            f"{rms_ratio(part.reshape(true.shape), true):.1e}"
            for part, true in zip(result, truth, strict=True)
        ]
        notes.append(
            f"error of {name} at n{n} E{width} {dtype}: loss, images, texts, scale, bias = {', '.join(errors)}"
        )
    return notes


def draw(table: list[Row], path: Path) -> None:
    """Times beside the products' and memory, by n, a column for each width and dtype with several n."""
    groups: dict[str, list[Row]] = {}
    for row in table:
        groups.setdefault(row.case.split(" ", 1)[1], []).append(row)
    groups = {name: part for name, part in groups.items() if len({row.case for row in part}) > 1}
    names = list(dict.fromkeys(row.contestant for row in table))
    with drawn(path, rows=2, columns=len(groups), size=(6 * len(groups), 8)) as panels:
        for column, (title, part) in enumerate(groups.items()):
            sizes = {row.case: int(row.case.split(" ")[0][1:]) for row in part}
            ceiling = {row.case: row.p50 for row in part if row.contestant == "products"}
            for name in dict.fromkeys(row.contestant for row in part if row.contestant != "products"):
                own = [row for row in part if row.contestant == name]
                style = {
                    "marker": "o",
                    "markersize": 3,
                    "linewidth": 2.5 if name == "ours" else 1,
                    "label": name,
                    # the same in every panel
                    "color": f"C{names.index(name)}",
                }
                panels[0][column].plot(
                    [sizes[row.case] for row in own], [row.p50 / ceiling[row.case] for row in own], **style
                )
                if kept := [(sizes[row.case], row.memory_mb) for row in own if row.memory_mb > 0]:
                    panels[1][column].plot(*zip(*kept, strict=True), **style)
            panels[0][column].axhline(1, color="k", linestyle=":", linewidth=1)
            panels[0][column].set_title(title, fontsize=10)
            for row, name in enumerate(("time / that of the products", "memory beside the inputs, MB")):
                panel = panels[row][column]
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.set_xlabel("n")
                panel.grid(alpha=0.3)
                if column == 0:
                    panel.set_ylabel(name)
                panel.legend(fontsize=7)


def main() -> None:
    """Compare at the sizes that suit the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cases", nargs="+", type=int, help="indices; default all")
    parser.add_argument("--save", action="store_true", help="keep rows and report in results/")
    parser.add_argument("--probe", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = CASES[device.type]
    if arguments.probe:
        index, name = arguments.probe
        n, width, dtype = cases[int(index)]
        inputs = draw_inputs(n, width, dtype, device)
        if name != "nothing":
            differentiate(contestants(n, dtype, device)[name], inputs)
        print(peak_resident_memory())
        return
    chosen = arguments.cases if arguments.cases is not None else list(range(len(cases)))
    notes = [
        "random unit vectors, text = image + noise; scale 117, bias -16.5; every loss is timed with its gradients"
    ]
    for dtype in sorted({cases[index][2] for index in chosen}):
        notes += accuracy(768, dtype, device)
    table = [row for index in chosen for row in compare(index, device, arguments.rounds, notes)]
    names = {row.contestant for row in table} - {"products"}
    notes += shares_of_products(table)
    baselines = dict.fromkeys(names - {"open_clip"}, "open_clip")
    finish(table, baselines, notes, save=arguments.save, draw=partial(draw, table))


if __name__ == "__main__":
    main()
