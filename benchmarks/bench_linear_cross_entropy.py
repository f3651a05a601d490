"""Cross-entropy over a large vocabulary, forward and backward, against torch's on all logits and against bare products.

"products" are the three of 2 T V D operations that any exact form needs, in the same run; a contestant's share of their
speed is their time over its own. Memory is the peak beside the inputs.
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
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from kernels import linear_cross_entropy
from kernels.dispatch import force
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from kernels.testing import rms_ratio

# tokens, width, vocabulary, dtype
CASES = {
    "cpu": [(2048, 256, 32000, "float32"), (512, 256, 64000, "bfloat16")],
    "cuda": [
        (8192, 768, 32000, "bfloat16"), (8192, 768, 256000, "bfloat16"), (8192, 1152, 256000, "bfloat16"),
        (32768, 768, 256000, "bfloat16"), (4096, 768, 256000, "float32"),
    ],
}  # fmt: skip
FULL_LOGITS = 4 * 10**9  # above, logits and what autograd keeps of them do not fit
ACCURACY = (256, 256, 32000)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What is written without thinking: logits in the inputs' dtype, their softmax in fp32."""
    return cross_entropy(linear(hidden, weight).float(), targets)


def by_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """This project's form in torch alone, which a CPU runs."""
    with force("chunked"):
        return linear_cross_entropy(hidden, weight, targets)


def by_triton(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """This project's kernel, whatever `kernels.dispatch` prefers at present."""
    with force("triton"):
        return linear_cross_entropy(hidden, weight, targets)


def torch_chunked() -> dict[str, Loss]:
    """The chunked form of torch itself, which came after 2.11."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return {}
    return {"torch chunked": partial(torch.nn.functional.linear_cross_entropy, options=options())}


def contestants(case: tuple[int, int, int, str], device: torch.device) -> dict[str, Loss]:
    """Those that fit a case, by name."""
    chosen: dict[str, Loss] = {"ours": by_triton if device.type == "cuda" else by_chunks}
    if device.type == "cuda":
        chosen["ours in torch"] = by_chunks
    if case[0] * case[2] <= FULL_LOGITS:
        chosen |= {"all logits": on_all_logits, "all logits compiled": torch.compile(on_all_logits)}
    return chosen | torch_chunked()


def draw_inputs(case: tuple[int, int, int, str], device: torch.device) -> list[Tensor]:
    """hidden and weight for logits of about one to five, and targets."""
    tokens, width, vocabulary, dtype = case
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device=device)
    weight = torch.randn(vocabulary, width, generator=generator, device=device) * 2 / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    return [hidden.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype)), targets]


def differentiate(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    """The loss and its gradients for hidden and weight."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:2]]
    value = loss(*leaves, inputs[2])
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def products(inputs: list[Tensor]) -> None:
    """The three products in chunks, with one buffer."""
    hidden, weight, _ = inputs
    size = min(len(hidden), 1024)
    buffer = hidden.new_empty(size, len(weight))
    for chunk in hidden.split(size):
        part = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
        torch.mm(part, weight)
        torch.mm(part.T, chunk)


def probe(index: int, name: str) -> float:
    """On CPU: the peak of a process of its own, beside that of one that only has the inputs."""
    values = [run_child([__file__, "--probe", str(index), other]).split()[-1] for other in (name, "nothing")]
    return float(values[0]) - float(values[1])


def compare(index: int, device: torch.device, rounds: int) -> list:
    """All contestants of one case, interleaved."""
    case = CASES[device.type][index]
    inputs = draw_inputs(case, device)
    losses = contestants(case, device)
    runs: dict[str, Callable[[], object]] = {
        name: partial(differentiate, loss, inputs) for name, loss in losses.items()
    }
    runs["products"] = partial(products, inputs)
    timers = {name: partial(timed, run, device) for name, run in runs.items()}
    measurements = measure(timers, rounds=rounds)
    if device.type == "cuda":
        memory = {name: cuda_memory_mb(runs[name]) for name in losses}
    else:  # of a compiled one, the peak is that of the compiler
        memory = {name: probe(index, name) for name in losses if not name.endswith("compiled")}
    tokens, width, vocabulary, dtype = case
    return rows(
        "linear_cross_entropy", f"T{tokens} D{width} V{vocabulary} {dtype}", "ms/loss", measurements, memory
    )


def accuracy(dtype: str, device: torch.device) -> list[str]:
    """Errors against float64 on the same inputs, as notes."""
    case = (*ACCURACY, dtype)
    inputs = draw_inputs(case, device)
    truth = differentiate(
        linear_cross_entropy_reference, [tensor.double() for tensor in inputs[:2]] + inputs[2:]
    )
    notes = []
    for name, loss in contestants(case, device).items():
        result = differentiate(loss, inputs)
        errors = ", ".join(f"{rms_ratio(part, true):.1e}" for part, true in zip(result, truth, strict=True))
        notes.append(
            f"error of {name} at T{case[0]} D{case[1]} V{case[2]} {dtype}: loss, hidden, weight = {errors}"
        )
    return notes


def main() -> None:
    """Compare at the sizes that suit the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", type=int, help="indices; default all")
    parser.add_argument("--save", action="store_true", help="keep rows and report in results/")
    parser.add_argument("--probe", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = CASES[device.type]
    if arguments.probe:
        index, name = arguments.probe
        inputs = draw_inputs(cases[int(index)], device)
        if name != "nothing":
            differentiate(contestants(cases[int(index)], device)[name], inputs)
        print(peak_resident_memory())
        return
    chosen = arguments.cases if arguments.cases is not None else list(range(len(cases)))
    notes = ["random inputs, logits of standard deviation 2; every loss is timed with both its gradients"]
    for dtype in sorted({cases[index][3] for index in chosen}):
        notes += accuracy(dtype, device)
    table = [row for index in chosen for row in compare(index, device, arguments.rounds)]
    names = {row.contestant for row in table} - {"products"}
    notes += shares_of_products(table)
    finish(table, dict.fromkeys(names - {"all logits"}, "all logits"), notes, save=arguments.save)


if __name__ == "__main__":
    main()
