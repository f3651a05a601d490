"""The sigmoid loss in other people's code: without this project's dependencies, and in open_clip's own training."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kernels.sigmoid_loss.reference import sigmoid_loss_reference
from kernels.testing import assert_close, rms_ratio
from tests.conftest import ROOT
from tests.kernels.test_sigmoid_loss import NAMES, blocks_by_dtype, differentiate
from tests.ranks import run_ranks

MODEL = {
    "embed_dim": 24,
    "init_logit_bias": -4,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 6, "vocab_size": 40, "layers": 1, "width": 16, "heads": 2},
}
ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is not there")

sys.meta_path.insert(0, Refuse())
import torch

before = set(sys.modules)
from kernels import sigmoid_loss

assert "triton" not in set(sys.modules) - before
torch.manual_seed(0)
tower, bias, inputs = torch.nn.Linear(8, 4), torch.nn.Parameter(torch.tensor(-2.0)), torch.randn(6, 8)
optimizer = torch.optim.SGD([*tower.parameters(), bias], lr=0.1)
texts = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
losses = []
for _ in range(5):
    optimizer.zero_grad()
    images = torch.nn.functional.normalize(tower(inputs), dim=-1)
    loss = sigmoid_loss(images, texts, torch.tensor(5.0), bias)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses == sorted(losses, reverse=True), losses
print(sigmoid_loss.__globals__["__file__"])
"""


def test_the_folder_alone_trains_with_torch_alone(tmp_path):
    """A copy of `kernels` elsewhere; none of this project's packages and dependencies can be imported."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]} - {
        "torch",
        "numpy",
        "triton",
    }
    modules = {name.removesuffix("-core").removesuffix("_torch").replace("-", "_") for name in distributions}
    blocked = modules | {"siglip_train", "data_tools", "PIL", "webdataset", "omegaconf", "transformers"}
    assert {"deepspeed", "hydra", "open_clip", "rich"} <= blocked
    code = ALONE.replace("{blocked}", repr(blocked))
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout


def documented_loss():
    """Runs the lines of the README: they put their class into open_clip's factory."""
    readme = (ROOT / "kernels" / "sigmoid_loss" / "README.md").read_text()
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "open_clip" in block
    )
    exec(code, {})


def train(folder, loss, precision, rank, world):
    """One epoch of two steps of open_clip's own loop; last gradients, parameters, and the losses it saw."""
    import open_clip
    from open_clip_train.train import train_one_epoch

    (Path(folder) / f"tiny{rank}.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(Path(folder) / f"tiny{rank}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(f"tiny{rank}", output_dict=True)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(rank)
    batches = [
        (
            torch.randn(5, 3, 16, 16, generator=generator, dtype=dtype),
            torch.randint(1, 40, (5, 6), generator=generator),
        )
        for _ in range(2)
    ]
    seen = []

    def watched(**inputs):
        losses = loss(**inputs)
        seen.append(losses["contrastive_loss"].item())
        return losses

    loader = type("Loader", (list,), {"num_batches": len(batches), "num_samples": 5 * world * len(batches)})
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader(batches))}
    args = Namespace(
        device="cpu", precision=precision, distill=False, accum_freq=1, skip_scheduler=True, horovod=False,
        grad_clip_norm=None, rank=rank, local_rank=rank, world_size=world, batch_size=5, log_every_n_steps=1,
        wandb=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    train_one_epoch(wrapped, data, watched, 0, optimizer, None, None, None, args)
    gradients = {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
    return {"losses": torch.tensor(seen, dtype=torch.float64)} | gradients | dict(model.named_parameters())


def differences(folder, precision, rank, world):
    """RMS ratios of everything that comes out of training with our loss and with open_clip's."""
    import open_clip.factory

    args = SimpleNamespace(
        distill=False,
        model="tiny",
        siglip=True,
        horovod=False,
        rank=rank,
        world_size=world,
        loss_dist_impl=None,
    )
    theirs = open_clip.factory.create_loss(args)
    original = open_clip.factory.SigLipLoss
    try:
        documented_loss()
        ours = open_clip.factory.create_loss(args)
    finally:
        open_clip.factory.SigLipLoss = original
    assert (type(theirs) is original, type(ours) is original) == (True, False)
    truth = train(folder, theirs, precision, rank, world)
    found = train(folder, ours, precision, rank, world)
    assert found.keys() == truth.keys()
    return {name: rms_ratio(found[name].detach(), truth[name].detach()) for name in truth}


def test_open_clip_training_under_autocast_multiplies_in_fp16(tmp_path, monkeypatch):
    """As on a GPU, whose autocast normalises embeddings to fp32: products of that would take it ten times as long."""
    pytest.importorskip("open_clip_train.train")
    import open_clip.factory

    monkeypatch.setattr(open_clip.factory, "SigLipLoss", open_clip.factory.SigLipLoss)
    documented_loss()
    ours, seen = open_clip.factory.SigLipLoss(), []

    def watched(*, image_features, text_features, logit_scale, logit_bias, **options):
        # the autocast of a CPU leaves them bf16
        inputs = [image_features.float(), text_features.float(), logit_scale, logit_bias]
        seen.append([tensor.detach().clone() for tensor in inputs])
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        loss = ours(*leaves)
        seen[-1] += [loss.detach(), *torch.autograd.grad(loss, leaves)]
        return ours(*inputs, **options)

    with blocks_by_dtype() as dtypes:
        train(tmp_path, watched, "amp_bf16", 0, 1)
    assert dtypes == [torch.float16] * 4
    for inputs, found in ((entry[:4], entry[4:]) for entry in seen):
        assert {tensor.dtype for tensor in inputs[:2]} == {torch.float32}
        expected = differentiate(sigmoid_loss_reference, inputs)
        for name, actual, truth in zip(NAMES, found, expected, strict=True):
            assert actual.dtype == torch.float32
            assert_close(actual, truth, 1e-3, name)  # measured 3e-4


def on_a_rank(folder):
    return differences(folder, "fp64", dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize(("precision", "limit"), [("fp64", 1e-12), ("amp_bf16", 0.1)])
def test_open_clip_trains_the_same_on_one_rank(tmp_path, precision, limit):
    pytest.importorskip("open_clip_train.train")
    found = differences(tmp_path, precision, 0, 1)
    assert {"losses", "logit_scale", "gradient of logit_scale", "gradient of logit_bias"} <= found.keys()
    assert len(found) > 40
    assert max(found.values()) < limit, found


@pytest.mark.dist
def test_open_clip_trains_the_same_on_two_ranks(tmp_path):
    pytest.importorskip("open_clip_train.train")
    for found in run_ranks(2, on_a_rank, str(tmp_path)):
        assert max(found.values()) < 1e-12, found
