"""What evaluators share: the `Encoder` that embeds texts and images on all ranks, and the form of results.

Evaluators hold no rank logic: they ask the encoder, and every rank gets every embedding.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from siglip_train.batch import Images
from siglip_train.data.config import DataConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.distributed.collectives import gather_objects, gather_rows
from siglip_train.distributed.setup import World
from siglip_train.errors import UserError
from siglip_train.evals.loader import (
    Caption,
    EvaluationBatch,
    EvaluationLoader,
    EvaluationSource,
    build_evaluation_loader,
)
from siglip_train.files.atomic import write_text
from siglip_train.files.records import to_json
from siglip_train.models.siglip import Siglip
from siglip_train.models.vision import VisionFeatures
from siglip_train.objectives.captioner import Captioner

# a slash would lead out of the folder, a dot at the beginning hides the file
_PLAIN_NAME = re.compile(r"\w[\w.+ -]*")


class Evaluation(NamedTuple):
    """One task's outcome.

    metrics: numbers to log. details: JSON-able, for the report; empty off the main rank.
    """

    metrics: dict[str, float]
    details: dict[str, Any]


class ImageSet(NamedTuple):
    """A whole evaluation set, in data order, the same on every rank; bad samples are left out.

    embeddings: `[n, E]` fp32 on the CPU, unit norm unless pooled outputs were asked for. labels: those that are right
    for each image, or None. keys: `shard/key` of each. groups: "" where none are wanted. original: the RGB image of
    row i in 0..n-1, for galleries. counts: samples seen and bad ones by cause.
    """

    embeddings: Tensor
    captions: list[list[Caption]]
    labels: list[tuple[int, ...]] | None
    keys: list[str]
    groups: list[str]
    original: Callable[[int], Image.Image]
    counts: dict[str, int]


class _Row(NamedTuple):
    """What comes with an image."""

    key: str
    captions: list[Caption]
    labels: tuple[int, ...]
    group: str


class Evaluator(Protocol):
    """A task. Its constructor takes plain keyword values; `run` is called by all ranks together."""

    def check(self) -> None:
        """Raise `UserError` for a file that it reads and that is missing or damaged. Cheap: no sample is read."""

    def run(self, encoder: "Encoder") -> Evaluation:
        """Measure the encoder's model."""


def _no_captioner() -> Captioner:
    raise UserError(
        "there is no decoder here: this task measures that of a run with +objective@objectives.NAME=captioning, or of "
        "a checkpoint inside it"
    )


def _go_on() -> None:
    """Never end an evaluation early."""


@dataclass(kw_only=True)
class Encoder:
    """A model that is ready to embed: with its tokenizer, its transform, its ranks and its precision.

    batch_size: rows a rank takes at once. workers: loader processes a rank.
    scalar_of: reads a one-element parameter; an engine that shards parameters (ZeRO-3) brings its own.
    on_batch: called before each batch on all ranks alike; may raise to end an evaluation early.
    heads: the objectives of the run, by name, for tasks that ask what they learned. whole: model and heads as the
    engine calls them (`TrainingModel.forward`), where it has sharded them. data: of the run, whose options (views,
    sentences) hold for tasks that make batches as training does.
    Each `encode_*` must be called by all ranks; every rank then makes the same number of forward calls, as
    ZeRO-3 needs, and gets the same result.
    """

    model: Siglip
    tokenizer: Callable[[list[str]], Tensor]
    transform: ImageTransform
    world: World
    precision: Literal["bf16", "fp32"] = "fp32"
    batch_size: int = 256
    workers: int = 0
    scalar_of: Callable[[Tensor], float] = Tensor.item
    on_batch: Callable[[], None] = lambda: None
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    captioner: Callable[[], Captioner] = lambda: _no_captioner()
    whole: Callable[..., Any] | None = None
    data: DataConfig = field(default_factory=DataConfig)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Embed texts: `[n, E]` fp32 on the CPU, unit norm, in the order given."""
        if not texts:
            raise ValueError("no text to embed")
        share = math.ceil(len(texts) / self.world.world_size)
        size = min(self.batch_size, share)
        mine = texts[self.world.rank * share :][:share]
        rows = []
        with self.inference():
            # all ranks: as many calls as the largest share needs, short ones filled up
            for first in range(0, share, size):
                self.on_batch()
                chunk = mine[first : first + size]
                tokens = self.tokenizer(chunk + [texts[0]] * (size - len(chunk)))  # [B, context_length]
                tokens = tokens.to(self.world.device, non_blocking=True)
                rows.append(self.model.encode_text(tokens)[: len(chunk)].float())
        return _finite(gather_rows(torch.cat(rows)).cpu(), "texts")

    def loader(self, source: EvaluationSource) -> EvaluationLoader:
        """Batches of a set for this rank, of at most `batch_size` images, crops counted singly. All ranks."""
        return build_evaluation_loader(
            source,
            self.transform,
            batch_size=max(1, self.batch_size // source.crops**2),
            rank=self.world.rank,
            world_size=self.world.world_size,
            workers=self.workers,
        )

    def encode_images(
        self, source: EvaluationSource, encode: Callable[[Images], Tensor] | None = None
    ) -> ImageSet:
        """Embed the images of a set and collect what came with them.

        encode: gives the rows in place of the model's unit embeddings, `[B, any width]`; `pool_images`, for one.
        """
        encode = encode or self.model.encode_image
        loader = self.loader(source)
        embeddings, index = [], []
        mine: list[_Row] = []
        for batch, encoded in self.encoded(loader, encode):
            is_real = batch.index >= 0  # [B]
            # by places found on the host, as a mask on the device would have the host wait for it
            places = is_real.nonzero().flatten().to(self.world.device, non_blocking=True)
            embeddings.append(encoded.index_select(0, places))
            index.append(batch.index[is_real])
            labels = batch.labels or [()] * len(batch.index)
            rows = zip(batch.keys, batch.captions, labels, batch.groups, strict=True)
            mine += [_Row(*row) for row, real in zip(rows, is_real.tolist(), strict=True) if real]
        everyone = [row for part in gather_objects(mine) for row in part]
        if not everyone:
            raise UserError(f"no usable image in {source.shards}; bad samples, if any, are named in the log")
        rows_of = gather_rows(torch.cat(index)).tolist()
        return ImageSet(
            embeddings=_finite(gather_rows(torch.cat(embeddings)).cpu(), "images"),
            captions=[row.captions for row in everyone],
            labels=[row.labels for row in everyone] if source.label is not None else None,
            keys=[row.key for row in everyone],
            groups=[row.group for row in everyone],
            original=lambda image: loader.original(rows_of[image]),
            counts=dict(sum(gather_objects(Counter(loader.counts)), Counter())),
        )

    def encoded(
        self, loader: EvaluationLoader, encode: Callable[[Images], Tensor]
    ) -> Iterator[tuple[EvaluationBatch, Tensor]]:
        """Every batch of a loader with what `encode` makes of it, fp32 on the device, fillers included. All ranks."""
        with self.inference():
            # all ranks: the loader gives each the same number of equally large batches; index -1 = filler
            for batch in loader:
                self.on_batch()
                images = Images(*(_moved(part, self.world.device) for part in batch.images))  # type: ignore[arg-type]
                yield batch, encode(images).float()

    def featured(self, loader: EvaluationLoader) -> Iterator[tuple[EvaluationBatch, VisionFeatures]]:
        """Every batch of a loader, fillers included, and what the vision tower makes of it. All ranks."""
        with self.inference():
            for batch in loader:
                self.on_batch()
                images = Images(*(_moved(part, self.world.device) for part in batch.images))  # type: ignore[arg-type]
                yield batch, self.model.vision(*images)

    def pool_images(self, images: Images) -> Tensor:
        """Give the vision tower's pooled output as it is, not unit-norm: `[B, D]`; probes are trained on it."""
        return self.model.vision(*images).pooled

    def scale_and_bias(self) -> tuple[float, float]:
        """Give the model's own logit multiplier exp(t') and bias. All ranks."""
        return math.exp(self.scalar_of(self.model.logit_scale)), self.scalar_of(self.model.logit_bias)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Within it, model and heads are in eval mode, without gradients, in this encoder's precision."""
        # module by module, because a frozen tower may be in eval mode inside a model that trains
        modes = [
            (module, module.training)
            for root in (self.model, *self.heads.values())
            for module in root.modules()
        ]
        for module, _ in modes:
            module.training = False
        device_type = self.world.device.type
        try:
            with (
                torch.no_grad(),
                torch.autocast(device_type, torch.bfloat16, enabled=self.precision == "bf16"),
            ):
                yield
        finally:
            for module, mode in modes:
                module.training = mode


def _moved(part: Tensor | None, device: torch.device) -> Tensor | None:
    return None if part is None else part.to(device, non_blocking=True)


def _finite(embeddings: Tensor, what: str) -> Tensor:
    if not embeddings.isfinite().all():
        # a NaN never compares as larger, so it would rank first and look like a perfect model
        raise UserError(
            f"the model's embeddings of {what} are not finite: the run diverged or the weights are damaged"
        )
    return embeddings


def check_all(tasks: Mapping[str, Evaluator], path: str) -> None:
    """Check the files of every task, before hours are spent on what it measures.

    Raises `UserError` naming the task as `path.NAME`.
    """
    for name, task in tasks.items():
        if not _PLAIN_NAME.fullmatch(name):
            raise UserError(f"{path}: {name!r} cannot name a task, whose results go to a file of that name")
        try:
            task.check()
        except UserError as error:
            raise UserError(f"{path}.{name}: {error}") from None


def run_all(tasks: dict[str, Evaluator], encoder: Encoder) -> dict[str, Evaluation]:
    """Run every task on all ranks, in the order of the dict."""
    return {name: task.run(encoder) for name, task in tasks.items()}


def flat_metrics(evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """Give every number as `task/metric`."""
    return {
        f"{task}/{metric}": value
        for task, evaluation in evaluations.items()
        for metric, value in evaluation.metrics.items()
    }


def write_evaluations(folder: Path, evaluations: dict[str, Evaluation], *, step: int | None = None) -> None:
    """Write `<task>.json` with step, metrics and details of each task, for the report. Main rank."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, evaluation in evaluations.items():
        content = {"task": task, "step": step, **evaluation._asdict()}
        write_text(folder / f"{task}.json", to_json(content))
