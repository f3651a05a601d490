"""One loader in a process of its own, driven over pipes by bench_loader.py, with the project's packages or the peer's.

Reads a line of JSON per measurement and answers with a line: samples a second, samples a CPU second, memory.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from harness import tree_cpu_seconds, tree_processes

BATCH_SIZE, CONTEXT_LENGTH, PATCH_SIZE = 64, 64, 16
WARMUP_BATCHES = 8  # more than a loader holds ready, so that none is measured that was made before


class Job(NamedTuple):
    """What to load: shards, the side of the images, a sentencepiece model, and for how long to measure."""

    shards: list[str]
    image_size: int
    tokenizer: str
    seconds: float


def load_ours(job: Job, *, reduced_jpeg: bool = True) -> Iterator[Any]:
    """`siglip_train.data`, one worker."""
    from siglip_train.data.batch_pieces import RankShare
    from siglip_train.data.config import DataConfig, SourceConfig
    from siglip_train.data.image_transform import ImageTransform
    from siglip_train.data.inputs.base import RunInputs
    from siglip_train.data.inputs.captions import CaptionInput
    from siglip_train.data.inputs.images import ImageInput
    from siglip_train.data.pipeline import build_loader
    from siglip_train.data.tokenizer import load_tokenizer

    config = DataConfig({"all": SourceConfig(job.shards)}, workers=1, resize="bicubic")
    transform = ImageTransform(job.image_size, PATCH_SIZE, resize="bicubic", reduced_jpeg=reduced_jpeg)
    tokenizer = load_tokenizer(job.tokenizer, context_length=CONTEXT_LENGTH)
    loader = build_loader(
        config,
        inputs=RunInputs((CaptionInput, ImageInput), transform, tokenizer),
        share=RankShare(BATCH_SIZE),
        seed=0,
    )
    return iter(loader)


def load_open_clip(job: Job) -> Iterator[Any]:
    """`get_wds_dataset` of open_clip_train, one worker, as its training command builds it."""
    import open_clip_train.data as peer

    # as large as its initial fill, so that the measured stretch is a steady state
    peer._SAMPLE_SHUFFLE_SIZE = peer._SAMPLE_SHUFFLE_INITIAL
    arguments = SimpleNamespace(
        train_data="::".join(job.shards),
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=BATCH_SIZE,
        workers=1,
        world_size=1,
        seed=0,
    )
    tokenize = _tokenizer(job.tokenizer)
    return iter(
        peer.get_wds_dataset(arguments, _transform(job.image_size), True, tokenizer=tokenize).dataloader  # noqa: FBT003
    )


def load_webdataset(job: Job) -> Iterator[Any]:
    """The pipeline of webdataset's own documentation, one worker."""
    import webdataset

    tokenize = _tokenizer(job.tokenizer)
    dataset = (
        webdataset.WebDataset(job.shards, shardshuffle=len(job.shards))
        .repeat()
        .shuffle(1000, initial=1000)
        .decode("pilrgb")
        .to_tuple("jpg;png;jpeg;webp", "txt")
        .map_tuple(_transform(job.image_size), lambda text: tokenize(text)[0])
        .batched(BATCH_SIZE)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=1))


CONTESTANTS: dict[str, Callable[[Job], Iterator[Any]]] = {
    "ours": load_ours,
    "ours, Pillow": load_ours,
    "ours, full decode": partial(load_ours, reduced_jpeg=False),
    "open_clip": load_open_clip,
    "webdataset": load_webdataset,
}


def _transform(image_size: int) -> Callable[[Any], Any]:
    """open_clip's transform with SigLIP's settings: squash, no crop, which costs less than its training crop."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    half = (0.5, 0.5, 0.5)
    settings = PreprocessCfg(
        size=image_size, mean=half, std=half, interpolation="bicubic", resize_mode="squash"
    )
    return image_transform_v2(settings, is_train=False)


def _tokenizer(path: str) -> Callable[[str], Any]:
    """The same sentencepiece model for the peers, called as open_clip calls its tokenizers."""
    import sentencepiece
    import torch

    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    end, pad = processor.eos_id(), processor.pad_id()

    def tokenize(text: str) -> Any:
        pieces = [*processor.encode(text.lower())[: CONTEXT_LENGTH - 1], end]
        return torch.tensor([pieces + [pad] * (CONTEXT_LENGTH - len(pieces))])

    return tokenize


class Measured:
    """A contestant at work: its loader goes on from one measurement to the next, as long as the job is the same."""

    def __init__(self, load: Callable[[Job], Iterator[Any]]) -> None:
        self.load = load
        self.job: Job | None = None
        self.batches: Iterator[Any] = iter(())

    def measure(self, job: Job) -> dict[str, float]:
        """Rates in the steady state, for `job.seconds`, and the memory at the end."""
        if job != self.job:
            # the workers of the last job end before those of this one start
            self.batches = iter(())
            self.job, self.batches = job, self.load(job)
        for _ in range(WARMUP_BATCHES):
            next(self.batches)
        start, cpu, count = time.perf_counter(), tree_cpu_seconds(), 0
        while time.perf_counter() - start < job.seconds:
            next(self.batches)
            count += BATCH_SIZE
        elapsed, spent = time.perf_counter() - start, tree_cpu_seconds() - cpu
        return {"per_second": count / elapsed, "per_cpu_second": count / spent, **_memory()}


def _memory() -> dict[str, float]:
    """MB of all processes, pages they share counted once, and of what the worker shares with no one."""
    tree = [_page_sizes(pid) for pid in tree_processes()]
    # not the code of libraries, which all contestants share
    total = sum(sizes["Pss_Anon"] + sizes["Pss_Shmem"] for sizes in tree)
    # the last child is the worker, or the server whose last child it is: trackers start before them
    worker = tree[-1]
    return {"memory_mb": total, "worker_mb": worker["Private_Clean"] + worker["Private_Dirty"]}


def _page_sizes(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) / 1024 for name, value in (line.split(":") for line in lines)}


def main() -> None:
    """Measure as often as asked, until the input ends."""
    load = CONTESTANTS[sys.argv[1]]
    if not sys.argv[1].startswith("ours"):
        # the peers must not find this project, nor we theirs
        assert str(Path(__file__).resolve().parents[1]) not in sys.path
    measured = Measured(load)
    for line in sys.stdin:
        print(json.dumps(measured.measure(Job(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
