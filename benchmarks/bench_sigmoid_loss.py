"""The sigmoid loss, forward and backward, against open_clip's in its forms and against bare matrix products.

The products alone ("products": the three of 2 n^2 E operations that any exact form needs, in the same run) are the
ceiling: a contestant's share of it is the time of the products over its own. Memory is the peak beside the inputs.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from harness import (
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
        (1024, 768, "bfloat16"), (4096, 768, "bfloat16"), (4096, 1152, "bfloat16"), (8192, 768, "float32"),
        (16384, 768, "bfloat16"), (32768, 768, "bfloat16"), (32768, 1152, "bfloat16"), (131072, 768, "bfloat16"),
        (1048576, 768, "bfloat16"),
    ],
}  # fmt: skip
DENSE_ROWS = 32768  # above, n x n logits and what autograd keeps of them do not fit
LARGE_ROWS = {"cpu": 4096, "cuda": 131072}  # above, one contestant takes many seconds: fewer rounds
BLOCK = 4096
ACCURACY_ROWS = {"cpu": 1024, "cuda": 8192}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def blockwise(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's loss block by block as on many ranks, each computed again in backward."""
    blocks, peer = max(1, len(images) // BLOCK), SigLipLoss()
    total = torch.zeros((), device=images.device)
    for row, image in enumerate(images.chunk(blocks)):
        for column, text in enumerate(texts.chunk(blocks)):
            total = total + checkpoint(
                peer._loss, image, text, scale, bias, negative_only=row != column, use_reentrant=False
            )
    return total / blocks


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
    if is_cuda and BLOCK < n <= LARGE_ROWS["cuda"]:
        chosen["open_clip blocks"] = blockwise
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


def compare(index: int, device: torch.device, rounds: int) -> list:
    """All contestants of one case, interleaved."""
    n, width, dtype = CASES[device.type][index]
    inputs = draw_inputs(n, width, dtype, device)
    losses = contestants(n, dtype, device)
    runs: dict[str, Callable[[], object]] = {
        name: partial(differentiate, loss, inputs) for name, loss in losses.items()
    }
    runs["products"] = partial(products, inputs)
    timers = {name: partial(timed, run, device) for name, run in runs.items()}
    if n > LARGE_ROWS[device.type]:
        measurements = measure(timers, rounds=min(rounds, 4 if n <= DENSE_ROWS else 2), warmup=1)
    else:
        measurements = measure(timers, rounds=rounds, warmup=3)
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
    notes = []
    for name, loss in contestants(n, dtype, device).items():
        result = differentiate(loss, inputs)
        errors = [
            f"{rms_ratio(part.reshape(true.shape), true):.1e}"
            for part, true in zip(result, truth, strict=True)
        ]
        notes.append(
            f"error of {name} at n{n} E{width} {dtype}: loss, images, texts, scale, bias = {', '.join(errors)}"
        )
    return notes


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
    table = [row for index in chosen for row in compare(index, device, arguments.rounds)]
    names = {row.contestant for row in table} - {"products"}
    notes += shares_of_products(table)
    finish(table, dict.fromkeys(names - {"open_clip"}, "open_clip"), notes, save=arguments.save)


if __name__ == "__main__":
    main()
