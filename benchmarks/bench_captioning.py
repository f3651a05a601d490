"""What the decoder's objective costs a training step: its share of time beside that of FLOPs, and its memory.

The memory stands beside that of the same step with plain logits, `[tokens, vocabulary]` at once. All contestants have
the same weights, images, captions and regions, and the losses of those with captions must agree before anything is
timed.
"""

import argparse
from functools import partial

import torch
from bench_step import Case, Step, build_step, draw_inputs
from harness import Row, finish, measure, peak_resident_memory, rows, run_child, timed
from torch import Tensor
from torch.nn import functional

from siglip_train.batch import Batch
from siglip_train.data.inputs.captions import CaptionSentences
from siglip_train.data.sentences import Sentences
from siglip_train.models.decoder import LogitHead, decoder_flops
from siglip_train.models.flops import flops_per_pair
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.captioning import TASKS, Captioning
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel

SIGMOID, OURS, TWICE, PLAIN = "sigmoid alone", "with captions", "logits twice", "plain logits"
NAMES = (SIGMOID, OURS, TWICE, PLAIN)
BASELINES = {OURS: SIGMOID, TWICE: OURS, PLAIN: OURS}
CASES = {
    "cpu": (Case("Ti/16 image 224 V 32k b16", 192, 12, 3, 224, 64, 32000, 16, ("fp32",)),),
    "cuda": (Case("B/16 image 224 V 256k b64", 768, 12, 12, 224, 64, 256000, 64, ("bf16",)),),
}
# tokens that are predicted in a sentence of each task: a caption, a short text and a box
COUNTED = {"cap": 16, "arf": 24, "gcap": 24}
_PREFIX = 3


class PlainLogits(LogitHead):
    """The logits of all positions at once, as they are written in a few lines."""

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, token_weights: Tensor | None = None, **_: str
    ) -> Tensor:
        """As `LogitHead.forward` with targets."""
        logits = functional.linear(hidden, self.weight).float().flatten(0, -2)  # [T, V]
        losses = functional.cross_entropy(logits, targets.flatten(), reduction="none")
        return (losses * token_weights.flatten()).sum()


def build(case: Case, name: str, device: torch.device) -> tuple[TrainingModel, Batch]:
    """A contestant and its batch."""
    torch.manual_seed(0)
    model, objectives = Siglip(case.config()), {"sigmoid": SigmoidLoss()}
    batch, _ = draw_inputs(case, device)
    if name != SIGMOID:
        objectives["captioning"] = captioning = Captioning(
            logits_twice=name == TWICE,
            decoder={
                "context_length": case.context_length, "vocab_size": case.vocab_size, "width": case.width,
                "depth": -(-case.depth // 2), "mlp_dim": 4 * case.width, "heads": case.heads,
                "vision_width": case.width,
            },
        )  # fmt: skip
        # not zero, so that a wrong product shows
        torch.nn.init.normal_(captioning.decoder.logits.weight, std=0.02)
        if name == PLAIN:
            captioning.decoder.logits.__class__ = PlainLogits
        batch = Batch({**batch.parts, **sentence_parts(case)}).to(device)
    return TrainingModel(model, objectives).to(device), batch


def sentence_parts(case: Case) -> dict[str, object]:
    """Random sentences of all tasks; half of the captions are predicted in parallel."""
    generator = torch.Generator().manual_seed(1)
    shape, sentences = (case.batch_size, case.context_length), {}
    for task, length in COUNTED.items():
        counted = torch.zeros(shape, dtype=torch.bool)
        counted[:, _PREFIX : _PREFIX + length] = True
        sentences[task] = Sentences(torch.randint(case.vocab_size, shape, generator=generator), counted)
    draw = torch.rand(case.batch_size, generator=generator)
    return {"caption_sentences": CaptionSentences(sentences.pop("cap"), draw), "regions": sentences}


def contestant(case: Case, precision: str, name: str, device: torch.device) -> Step:
    """The step of a contestant."""
    module, batch = build(case, name, device)
    return build_step(module, lambda whole: whole(batch).total, precision)


def compare(case: Case, precision: str, device: torch.device, rounds: int) -> list[Row]:
    """All contestants; memory first, each alone."""
    memory = {name: peak_memory(case, precision, name, device) for name in NAMES}
    steps = {name: contestant(case, precision, name, device) for name in NAMES}
    timers = {name: partial(timed, step, device) for name, step in steps.items()}
    return rows(
        "captioning", f"{case.name} {precision}", "ms/step", measure(timers, rounds=rounds, warmup=2), memory
    )


def peak_memory(case: Case, precision: str, name: str, device: torch.device) -> float:
    """Peak MB of three steps: of the allocator on CUDA, of a process of its own on CPU."""
    if device.type == "cpu":
        return float(run_child([__file__, "--probe", precision, name]).split()[-1])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = contestant(case, precision, name, device)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() / 2**20


def notes_on(case: Case, table: list[Row], device: torch.device) -> list[str]:
    """The shares of time and of FLOPs, and that the losses agree."""
    losses = {}
    for name in NAMES[1:]:
        module, batch = build(case, name, device)
        losses[name] = module(batch).terms["captioning"].item()
        config = module.objectives["captioning"].decoder.config
    assert max(losses.values()) / min(losses.values()) - 1 < 1e-4, losses
    image_tokens = case.config().vision.grid ** 2
    pair = flops_per_pair(case.config())
    decoder = decoder_flops(config, image_tokens, len(TASKS), sum(COUNTED.values()) / len(TASKS))
    head = 6.0 * sum(COUNTED.values()) * case.width * case.vocab_size
    medians = {row.contestant: row.p50 for row in table}
    positions = case.batch_size * (case.context_length - 1)
    return [
        f"{case.name}: the objective is {1 - medians[SIGMOID] / medians[OURS]:.1%} of the step's time and "
        f"{decoder / (pair + decoder):.1%} of its FLOPs ({decoder / 1e9:.2f} GFLOP of a sample beside "
        f"{pair / 1e9:.2f} of the towers; {head / decoder:.0%} of them are logits), with "
        f"{', '.join(f'{count} tokens of {task}' for task, count in COUNTED.items())} that count",
        f"plain logits: {positions} x {case.vocab_size} for each task, "
        f"{4 * positions * case.vocab_size / 2**20:.0f} MB in fp32; the gradient of the vocabulary's matrix is "
        f"{4 * case.width * case.vocab_size / 2**20:.0f} MB, of which three are alive, with logits_twice one",
        f"first loss of captions {', '.join(f'{name} {loss:.5f}' for name, loss in losses.items())}",
    ]


def main() -> None:
    """Compare at the sizes that suit the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="keep rows and report in results/")
    parser.add_argument("--probe", nargs=2, metavar=("PRECISION", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (case,) = CASES[device.type]
    if arguments.probe:
        step = contestant(case, *arguments.probe, device)
        for _ in range(3):
            step()
        print(peak_resident_memory())
        return
    table = [
        row for precision in case.precisions for row in compare(case, precision, device, arguments.rounds)
    ]
    finish(table, BASELINES, notes_on(case, table, device), save=arguments.save)


if __name__ == "__main__":
    main()
