"""The value of any objective of a run on held-out samples, of whatever inputs it is made."""

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor

from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.config import SourceConfig
from siglip_train.data.counting import count_samples
from siglip_train.data.inputs.base import RunInputs
from siglip_train.data.pipeline import build_loader
from siglip_train.data.remote.locations import check_local
from siglip_train.data.shards.select import Selection, as_selection
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.distributed.collectives import sum_over_ranks
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder, Evaluation
from siglip_train.objectives.base import Objective
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.training_model import TrainingModel


@dataclass(kw_only=True)
class ObjectiveLoss:
    """The loss of one of the run's objectives, and of each of its tasks, without weights.

    Samples come in data order, uncropped and unmirrored, in blocks over all ranks: objectives that pair samples do so
    within a block, so that the value depends neither on the training batch nor, where the ranks divide a block, on
    their number. The remainder is left out.

    objective: its name below `objectives`. reference_batch: samples in a block; where there are fewer, all of them are
    one. text, label, regions: as in `data.sources`, where the objective needs them. What batches are made by besides
    (`data.sentences`, `data.views`) is as in the run.
    """

    shards: str | list[str]
    objective: str
    image: str = SourceConfig.image
    text: Any = None
    label: str | None = None
    regions: str | None = None
    reference_batch: int = 256
    max_samples: int | None = None
    select: Selection | dict[str, Any] = field(default_factory=Selection)

    def __post_init__(self) -> None:
        """Check ranges and what makes up the source."""
        if self.reference_batch < 1 or (self.max_samples or 1) < 1:
            raise ValueError("reference_batch and max_samples must be at least 1")
        self._source = SourceConfig(
            shards=self.shards,
            image=self.image,
            text=self.text,
            label=self.label,
            regions=self.regions,
            select=as_selection(self.select),
        )

    def check(self) -> None:
        """Find the shards."""
        check_local(self.shards)

    def run(self, encoder: Encoder) -> Evaluation:
        """Sum the tasks over blocks and ranks. All ranks."""
        objective = self._objective(encoder)
        whole = encoder.whole or TrainingModel(encoder.model, {self.objective: objective})
        data = replace(
            encoder.data,
            sources={"held_out": self._source},
            stages=[],
            order="sequential",
            workers=encoder.workers,
            # hours into a run is no time for an error: another sample takes the place of a bad one
            max_bad_share=1.0,
        )
        samples, ranks = count_samples(data)["held_out"], encoder.world.world_size
        samples = min(samples, self.max_samples or samples)
        block = min(self.reference_batch, samples) // ranks * ranks
        if block == 0:
            raise UserError(f"{self.shards} holds {samples} samples for {ranks} ranks: each needs one")
        loader = build_loader(
            data,
            inputs=RunInputs(
                objective.inputs,
                replace(encoder.transform, flip=False, min_crop_area=1.0, reduced_jpeg=False),
                cast(Tokenizer, encoder.tokenizer),
            ),
            share=RankShare(block, encoder.world.rank, ranks),
            seed=0,
        )
        sums: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        with encoder.inference():
            for batch in itertools.islice(loader, samples // block):
                encoder.on_batch()
                counts.update(objective.counts(batch))
                found = whole(batch.to(encoder.world.device), None, self._sums)
                # added up on the device, for which nothing waits before the end
                sums = {task: total.double() + sums.get(task, 0) for task, total in found.items()}
        total = sum_over_ranks({task: value.item() for task, value in sums.items()})
        number = sum_over_ranks(counts)
        means = {task: total[task] / max(1, number[task]) for task in total}
        loss = sum(objective.task_weights.get(task, 1.0) * mean for task, mean in means.items())
        tasks = {f"{task}_loss": mean for task, mean in means.items()} if len(means) > 1 else {}
        seen = {
            name: int(count)
            for name, count in sum_over_ranks(loader.counts).items()
            if name == "seen" or name.startswith("bad/")
        }
        return Evaluation({"loss": loss, **tasks}, {"counts": seen} if encoder.world.is_main else {})

    def _sums(self, model: TrainingModel, forward_pass: ForwardPass) -> dict[str, Tensor]:
        return model.objectives[self.objective](forward_pass)

    def _objective(self, encoder: Encoder) -> Objective:
        objective = encoder.heads.get(self.objective)
        if not isinstance(objective, Objective):
            there = ", ".join(encoder.heads) or "none"
            raise UserError(f"there is no objective {self.objective!r} to measure; there are: {there}")
        return objective
