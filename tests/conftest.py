"""Fixtures that several packages share: the generated data set, and a small run's arguments."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from tests.faults.table import pytest_terminal_summary, record_fault  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that is made once for all pytest workers; the others wait for it."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = shared / name, shared / f"{name}.made"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated data set."""
    return once(tmp_path_factory, "tiny", _make_tiny)


def _make_tiny(folder: Path) -> None:
    command = [sys.executable, "-m", "data_tools", "make-tiny", str(folder), "--samples", "600"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="session")
def tiny_tasks(tiny_data: Path) -> list[str]:
    """Overrides that put the quickstart's evaluation tasks on the small data set."""
    classes = [
        f"tasks.{name}.{key}={tiny_data}/classes_{name}/{file}"
        for name in ("seen", "unseen")
        for key, file in (
            ("shards", "*.tar"),
            ("classnames", "classnames.txt"),
            ("templates", "templates.txt"),
        )
    ]
    return classes + [f"tasks.{name}.shards={tiny_data}/validation/*.tar" for name in ("retrieval", "loss")]


@pytest.fixture(scope="session")
def small_run(tiny_data: Path, tiny_tasks: list[str]) -> list[str]:
    """Overrides that make the quickstart a run of a few seconds on the small data set."""
    return [
        "experiment=quickstart",
        "device=cpu",
        f"tokenizer={tiny_data}/tokenizer.model",
        f"data.sources.tiny.shards={tiny_data}/train/*.tar",
        "++data.sources.tiny.language=json:language",
        *[f"evaluation.{task}" for task in tiny_tasks],
        "data.workers=0",
        "model.vision.width=32",
        "model.vision.depth=1",
        "model.vision.mlp_dim=64",
        "model.text.width=32",
        "model.text.depth=1",
        "model.text.mlp_dim=64",
        "global_batch_size=24",
        "total_samples=240",
        "optim.warmup_samples=48",
        "checkpoint.every_steps=3",
        "log.every_steps=1",
    ]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters only: pad 0, EOS 1, unknown 2."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "letters"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat", "a blue dog", "the quick fox jumps over my lazy wren"] * 20),
        model_prefix=str(prefix),
        model_type="char",
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")
