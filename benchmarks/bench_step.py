"""A training step - forward, loss, backward, AdamW - of this project against open_clip's, in one process.

Same sizes, same weights, same images and captions, same optimizer class, same precision. Before timing, the
losses of both on the same batch must agree, and parameters and FLOPs are counted on both sides.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import open_clip
import timm
import torch
from harness import Row, finish, measure, peak_resident_memory, rows, run_child, timed
from open_clip.loss import SigLipLoss
from open_clip.model import CustomTextCLIP
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from siglip_train.batch import Batch, Images
from siglip_train.interop.names import translate
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel

BASELINES = {"ours": "open_clip", "ours compiled": "open_clip compiled"}
EAGER = ("ours", "open_clip")
ALL = (*EAGER, "ours compiled", "open_clip compiled")


@dataclass(frozen=True)
class Case:
    """Sizes of a comparison; both towers have the same width, depth and heads."""

    name: str
    width: int
    depth: int
    heads: int
    image_size: int
    context_length: int
    vocab_size: int
    batch_size: int
    precisions: tuple[str, ...]
    contestants: tuple[str, ...] = ALL

    def config(self) -> SiglipConfig:
        """The sizes as this project states them."""
        shared = {"width": self.width, "depth": self.depth, "mlp_dim": 4 * self.width, "heads": self.heads}
        return SiglipConfig(
            VisionConfig(image_size=self.image_size, patch_size=16, **shared),
            TextConfig(context_length=self.context_length, vocab_size=self.vocab_size, **shared),
        )


CPU_CASES = (
    Case("w192-d6 image 128 b32", 192, 6, 3, 128, 32, 1024, 32, ("fp32", "bf16")),
    Case("Ti/16 image 224 b16", 192, 12, 3, 224, 64, 32000, 16, ("bf16",), EAGER),
)
CUDA_CASES = (Case("B/16 image 224 b256", 768, 12, 12, 224, 64, 32000, 256, ("bf16",)),)
CASES = {"cpu": CPU_CASES, "cuda": CUDA_CASES}
Step = Callable[[], Tensor]


def build_peer(case: Case) -> nn.Module:
    """open_clip's own classes at the sizes of a case: timm's SigLIP vision tower, open_clip's text tower."""

    def tower(**options: Any) -> VisionTransformer:
        sizes = {"patch_size": 16, "embed_dim": case.width, "depth": case.depth, "num_heads": case.heads}
        shape = {"img_size": case.image_size, "class_token": False, "act_layer": "gelu_tanh"}
        # open_clip names these two; the rest is timm's book-keeping of downloads
        asked = {key: options[key] for key in ("num_classes", "global_pool")}
        return VisionTransformer(**sizes, **shape, **asked)

    name = f"vit_benchmark_siglip_w{case.width}_d{case.depth}_{case.image_size}"
    if not timm.is_model(name):
        tower.__name__, tower.__module__ = name, timm.models.vision_transformer.__name__
        timm.models.register_model(tower)
    return CustomTextCLIP(
        embed_dim=case.width,
        init_logit_scale=2.302585093,
        init_logit_bias=-10.0,
        output_dict=True,
        vision_cfg={
            "timm_model_name": name,
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": case.image_size,
        },
        text_cfg={
            "context_length": case.context_length,
            "vocab_size": case.vocab_size,
            "width": case.width,
            "heads": case.heads,
            "layers": case.depth,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
    )


class PeerTraining(nn.Module):
    """open_clip's model and loss, called as its training loop does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = SigLipLoss()

    def forward(self, pixels: Tensor, texts: Tensor) -> Tensor:
        return self.loss(**self.model(pixels, texts))


def draw_inputs(case: Case, device: torch.device) -> tuple[Batch, Tensor]:
    """The same random batch as this project takes it (uint8 patches) and as open_clip does (-1..1 pixels)."""
    generator = torch.Generator().manual_seed(0)
    side, size = case.image_size // 16, case.batch_size
    levels = torch.randint(0, 256, (size, case.image_size, case.image_size, 3), generator=generator)
    texts = torch.randint(0, case.vocab_size, (size, case.context_length), generator=generator)
    patches = levels.reshape(size, side, 16, side, 16, 3).transpose(2, 3).reshape(size, side * side, -1)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(size, -1, -1)
    batch = Batch({"images": Images(patches.to(torch.uint8), grid.contiguous()), "texts": texts})
    pixels = (levels.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
    return batch.to(device), pixels.to(device)


def build_losses(
    case: Case, device: torch.device
) -> dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    """Both modules with the same weights, and how each is called for its loss."""
    torch.manual_seed(0)
    peer = build_peer(case)
    ours = Siglip(case.config())
    state = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    ours.load_state_dict(translate(state, case.config(), "open_clip", where="open_clip"))
    batch, pixels = draw_inputs(case, device)
    return {
        "ours": (
            TrainingModel(ours, {"sigmoid": SigmoidLoss(weight=1.0)}).to(device),
            lambda module: module(batch).total,
        ),
        "open_clip": (PeerTraining(peer).to(device), lambda module: module(pixels, batch.part("texts"))),
    }


def build_step(module: nn.Module, loss_of: Callable[[nn.Module], Tensor], precision: str) -> Step:
    """One optimizer step on a fixed batch; returns the loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=1e-4)
    device = next(module.parameters()).device

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(module)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def build_contestant(case: Case, precision: str, name: str, device: torch.device) -> Step:
    """The step of one contestant by its name, `NAME` or `NAME compiled`."""
    module, loss_of = build_losses(case, device)[name.removesuffix(" compiled")]
    return build_step(torch.compile(module) if name.endswith("compiled") else module, loss_of, precision)


def check_equal_work(case: Case, device: torch.device) -> str:
    """Raise unless both have the same parameters, FLOPs and loss; return that as a note."""
    # eight pairs will do, and fit a small GPU without fused attention
    case = replace(case, batch_size=8)
    parameters, flops, losses = {}, {}, {}
    for name, (module, loss_of) in build_losses(case, device).items():
        parameters[name] = sum(parameter.numel() for parameter in module.parameters())
        # the math backend, because fused attention has no FLOP formula on CPU
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(module)
            loss.backward()
        flops[name], losses[name] = counter.get_total_flops(), loss.item()
    assert parameters["ours"] == parameters["open_clip"], parameters
    assert abs(losses["ours"] / losses["open_clip"] - 1) < 1e-4, losses
    assert abs(flops["ours"] / flops["open_clip"] - 1) < 0.02, flops
    return (
        f"{case.name}: {parameters['ours'] / 1e6:.2f} M parameters on both sides; GFLOP for 8 pairs "
        f"{flops['ours'] / 1e9:.1f} (ours), {flops['open_clip'] / 1e9:.1f} (open_clip); first loss "
        f"{losses['ours']:.5f}, {losses['open_clip']:.5f}"
    )


def peak_memory(index: int, precision: str, name: str, device: torch.device) -> float:
    """Peak MB of three steps: of the allocator on CUDA, of a process of its own on CPU.

    0 for a compiled contestant on CPU, where the peak is that of the compiler.
    """
    if device.type == "cpu":
        probe = [__file__, "--probe", str(index), precision, name]
        return float(run_child(probe).split()[-1]) if name in EAGER else 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = build_contestant(CASES[device.type][index], precision, name, device)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() / 2**20


def compare(index: int, precision: str, device: torch.device, rounds: int) -> list[Row]:
    """All contestants of one case and precision, interleaved."""
    case = CASES[device.type][index]
    memory = {name: peak_memory(index, precision, name, device) for name in case.contestants}
    steps = {name: build_contestant(case, precision, name, device) for name in case.contestants}
    timers = {name: partial(timed, step, device) for name, step in steps.items()}
    measurements = measure(timers, rounds=rounds, warmup=3)
    return rows("step", f"{case.name} {precision}", "ms/step", measurements, memory)


def main() -> None:
    """Compare at the sizes that suit the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cases", nargs="+", type=int, help="indices; default all")
    parser.add_argument("--save", action="store_true", help="keep rows and report in results/")
    parser.add_argument("--probe", nargs=3, metavar=("CASE", "PRECISION", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = CASES[device.type]
    if arguments.probe:
        index, precision, name = arguments.probe
        step = build_contestant(cases[int(index)], precision, name, device)
        for _ in range(3):
            step()
        print(peak_resident_memory())
        return
    chosen = arguments.cases if arguments.cases is not None else range(len(cases))
    notes = [check_equal_work(cases[index], device) for index in chosen]
    notes.append(f"open_clip {open_clip.__version__}, timm {timm.__version__}; AdamW of torch on both sides")
    table = [
        row
        for index in chosen
        for precision in cases[index].precisions
        for row in compare(index, precision, device, arguments.rounds)
    ]
    finish(table, BASELINES, notes, save=arguments.save)


if __name__ == "__main__":
    main()
