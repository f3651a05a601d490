"""Every block of Python in the READMEs runs as it stands, one README after the other, on small models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_tools.tokenizer.train import TrainingOptions, train_tokenizer
from siglip_train.interop import probe
from siglip_train.interop.conversion import Request, convert
from tests.conftest import ROOT
from tests.house.commands import readmes
from tests.interop.test_classifier import NAMES, build_run
from tests.interop.test_usage import SHORT, code_of, write_image, write_source

E = 24  # the embedding width of the small model
# run by tests/kernels/test_drop_in.py
ELSEWHERE = {ROOT / "kernels/sigmoid_loss/README.md"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the runs, exports and files that the READMEs name."""
    train_tokenizer(list(probe.TEXTS) * 20, tmp_path / "bpe.model", TrainingOptions(400))
    for name in ("quickstart", "cifar"):
        write_source(tmp_path / "outputs" / name, SHORT, tmp_path / "bpe.model")
    for name in ("one.jpg", "two.png"):
        write_image(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, **values: Any) -> dict[str, Any]:
    """Run the blocks of a README in turn, and give what they leave."""
    blocks = code_of(ROOT / name)
    assert blocks
    for block in blocks:
        # a line that only gives a value would show it in an interpreter; here it must not fail
        exec(block, values)
    return values


def test_no_readme_with_code_is_left_out() -> None:
    with_code = {file for file in readmes() if "```python" in file.read_text()}
    tested = {"README.md", "conf/README.md", "kernels/README.md"}
    tested |= {f"siglip_train/{part}/README.md" for part in ("evals", "interop")}
    assert with_code == {ROOT / name for name in tested} | ELSEWHERE


@pytest.mark.usefixtures("home")
def test_the_code_of_the_first_readme_runs() -> None:
    values = run("README.md")
    assert values["images"].shape == values["texts"].shape == (2, E)
    torch.testing.assert_close(values["images"].norm(dim=1), torch.ones(2))


def test_the_code_about_weights_runs(home: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(home / "outputs" / "quickstart", home / "export" / "tower", Request("hf", part="vision"))
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    values = run(
        "siglip_train/interop/README.md",
        photo=Image.open("one.jpg"),
        transformers=transformers,
        pixels=pixels,
    )
    assert values["logits"].shape == (1, 2)
    assert values["texts"].shape == (2, E)


@pytest.mark.usefixtures("home")
def test_the_code_about_evaluation_runs() -> None:
    pytest.importorskip("clip_benchmark")
    values = run("siglip_train/evals/README.md")
    picture = values["transform"](Image.open("one.jpg"))[None]
    assert values["model"].encode_image(picture).shape == (1, E)


def test_the_code_about_classifiers_runs(home: Path) -> None:
    transformers = pytest.importorskip("transformers")
    build_run(home / "run", "kind")
    convert(home / "run", home / "export" / "clothing", Request("hf", part="classifier", class_names=NAMES))
    picture = Image.open("one.jpg").convert("RGB")
    values = run("conf/README.md", photo=picture, transformers=transformers)
    assert values["classify"](picture, top_k=1)[0]["label"] in NAMES


def test_the_code_about_kernels_runs() -> None:
    torch.manual_seed(0)
    images, texts = torch.nn.functional.normalize(torch.randn(2, 6, E), dim=-1)
    values = run(
        "kernels/README.md",
        image_embeddings=images.requires_grad_(),
        text_embeddings=texts.requires_grad_(),
        logit_scale=torch.tensor(10.0),
        logit_bias=torch.tensor(-10.0),
        group=None,
        ids=torch.arange(6),
        hidden=torch.randn(6, E),
        vocabulary_weight=torch.randn(11, E),
        targets=torch.arange(6),
    )
    assert values["scores"].images.shape == values["scores"].texts.shape == (6,)
