"""Prototype cross-entropy, forward and backward, against the same in torch on all logits, with its memory.

"patches" are masked patches, one view of each; "views" are eight local views of each image.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from harness import cuda_memory_mb, finish, measure, peak_resident_memory, rows, run_child, timed
from torch import Tensor
from torch.nn.functional import normalize

from kernels import prototype_cross_entropy
from kernels.prototype_cross_entropy import PrototypeSums, Temperatures
from kernels.prototype_cross_entropy.reference import prototype_cross_entropy_reference

# what is compared, rows of the teacher, views of each, prototypes, width of the bottleneck
CASES = {
    "cpu": [("patches", 2048, 1, 8192, 128), ("views", 64, 8, 32768, 256)],
    "cuda": [
        ("patches", 32768, 1, 32768, 256),
        ("patches", 8192, 1, 32768, 256),
        ("views", 256, 8, 32768, 256),
    ],
}
TEMPERATURES = Temperatures()
Loss = Callable[..., PrototypeSums]
CONTESTANTS: dict[str, Loss] = {
    "ours": prototype_cross_entropy,
    "all logits": prototype_cross_entropy_reference,
}


def draw_inputs(case: tuple[str, int, int, int, int], device: torch.device) -> list[Tensor]:
    """Student, its prototypes, teacher, its prototypes, centre: unit vectors in fp32, and zeros."""
    _, count, views, prototypes, width = case
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((count, views, width), (prototypes, width), (count, width), (prototypes, width))
    drawn = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    return [*(normalize(each, dim=-1) for each in drawn), torch.zeros(prototypes, device=device)]


def differentiate(loss: Loss, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of student and prototypes."""
    leaves = [each.detach().requires_grad_() for each in inputs[:2]]
    return torch.autograd.grad(loss(*leaves, *inputs[2:], temperatures=TEMPERATURES).loss, leaves)


def probe(index: int, name: str) -> float:
    """On CPU: the peak of a process of its own, beside that of one that only has the inputs."""
    values = [run_child([__file__, "--probe", str(index), other]).split()[-1] for other in (name, "nothing")]
    return float(values[0]) - float(values[1])


def compare(index: int, device: torch.device, rounds: int) -> list:
    """Both contestants of one case, interleaved."""
    what, count, views, prototypes, width = case = CASES[device.type][index]
    inputs = draw_inputs(case, device)
    runs = {name: partial(differentiate, loss, inputs) for name, loss in CONTESTANTS.items()}
    measurements = measure({name: partial(timed, run, device) for name, run in runs.items()}, rounds=rounds)
    memory = {
        name: cuda_memory_mb(run) if device.type == "cuda" else probe(index, name)
        for name, run in runs.items()
    }
    title = f"{what} R{count} V{views} K{prototypes} D{width} float32"
    return rows("prototype_cross_entropy", title, "ms/loss", measurements, memory)


def main() -> None:
    """Compare at the sizes that suit the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="keep rows and report in results/")
    parser.add_argument("--probe", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.probe:
        index, name = arguments.probe
        inputs = draw_inputs(CASES[device.type][int(index)], device)
        if name != "nothing":
            differentiate(CONTESTANTS[name], inputs)
        print(peak_resident_memory())
        return
    table = [
        row for index in range(len(CASES[device.type])) for row in compare(index, device, arguments.rounds)
    ]
    notes = ["unit vectors at random; every loss is timed with both its gradients"]
    finish(table, {"ours": "all logits"}, notes, save=arguments.save)


if __name__ == "__main__":
    main()
