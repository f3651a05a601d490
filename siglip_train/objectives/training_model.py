"""The model and its objectives as one module: what the engine wraps and the loop calls."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from siglip_train.batch import Batch
from siglip_train.data.inputs.base import Input
from siglip_train.models.ema import EmaConfig, Teacher
from siglip_train.models.flops import image_flops
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.base import Losses, Objective, StepSizes
from siglip_train.objectives.forward_pass import ForwardPass

# by `objective/task`: what a task's sum on this rank is divided by, so that the mean over ranks of the quotients is the
# mean over the samples of the global batch
Divisors = Mapping[str, Tensor]


# gives the value of a parameter with one element, whose parts may lie on several ranks
Scalar = Callable[[nn.Parameter], float]


class TrainingModel(nn.Module):
    """`model` and the objectives it is trained on, by the names they have in the config and in the logs."""

    def __init__(
        self,
        model: Siglip,
        objectives: Mapping[str, Objective],
        *,
        ema: EmaConfig | None = None,
        global_batch_size: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict(dict(objectives))
        for _, objective in self._named():
            objective.share_with(model)
        others = dict(self.objectives.items())
        for _, objective in self._named():
            objective.share_among(others)
        ema = ema or EmaConfig()
        self._averages_tower = ema.scope == "tower_and_head"
        students = self._students()
        self.teacher = Teacher(students, ema.momentum_at(global_batch_size)) if students else None

    def _students(self) -> dict[str, nn.Module]:
        """What the teacher has copies of: heads of objectives as `<objective>/<module>`, and `vision`."""
        heads = {
            f"{name}/{module}": objective.get_submodule(module)
            for name, objective in self._named()
            for module in objective.averaged
        }
        return {"vision": self.model.vision, **heads} if heads and self._averages_tower else heads

    def _copies(self) -> dict[nn.Module, nn.Module]:
        if self.teacher is None:
            return {}
        return {student: self.teacher.copies[name] for name, student in self._students().items()}

    def start_teacher(self, loaded: Collection[str] = ()) -> None:
        """Let the teacher, if there is one, begin as the student is now, but for its parameters named in `loaded`."""
        if self.teacher is not None:
            own = {name.removeprefix("teacher.") for name in loaded if name.startswith("teacher.")}
            self.teacher.start_from(self._students(), own)

    @property
    def inputs(self) -> tuple[type[Input], ...]:
        """The classes of what the objectives need of a sample, each once."""
        return tuple(dict.fromkeys(kind for _, objective in self._named() for kind in objective.inputs))

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many of this rank's samples take part in each task, by `objective/task`."""
        found = {}
        for name, objective in self._named():
            found.update({f"{name}/{task}": count for task, count in objective.counts(batch).items()})
        return found

    def forward(
        self,
        batch: Batch,
        divisors: Divisors | None = None,
        part: Callable[["TrainingModel", ForwardPass], Any] | None = None,
    ) -> Any:
        """Run the passes the objectives ask for and return the `Losses` of `batch`, or what `part` makes of them.

        All work goes through here, in parts where need be: ZeRO-3 gathers weights for the forward of a module.
        divisors: None = the counts of this batch alone, as in a single process.
        """
        forward_pass = ForwardPass(self.model, batch, self._copies())
        if part is not None:
            return part(self, forward_pass)
        if divisors is None:
            divisors = {name: torch.tensor(max(1, count)) for name, count in self.counts(batch).items()}
        return self.losses(forward_pass, divisors)

    def losses(
        self, forward_pass: ForwardPass, divisors: Divisors, names: Iterable[str] | None = None
    ) -> Losses:
        """Return the losses of the named objectives, by default of all, in the order given; without any, 0."""
        terms: dict[str, Tensor] = {}
        weighted = []
        # a loop, not a comprehension: one frame less between the loop and the objective
        for name, objective in self._named(names):
            tasks = {
                task: total / divisors[f"{name}/{task}"].to(total.dtype)
                for task, total in objective(forward_pass).items()
            }
            term = torch.stack(
                [objective.task_weights.get(task, 1.0) * mean for task, mean in tasks.items()]
            ).sum()
            weighted.append(objective.weight * term)
            terms[name] = term.detach()
            if len(tasks) > 1:
                terms.update({f"{name}/{task}": mean.detach() for task, mean in tasks.items()})
        total = torch.stack(weighted).sum() if weighted else self.model.logit_bias.new_zeros(())
        return Losses(total, terms)

    def after_step(self) -> None:
        """Tell the teacher and every objective that an optimizer step has changed the weights.  # all ranks"""
        if self.teacher is not None:
            self.teacher.follow(self._students())
        for _, objective in self._named():
            objective.after_step()

    def metrics(self, scalar: Scalar) -> dict[str, float]:
        """Scale and bias of the logits, and what the objectives add to the log.  # all ranks"""
        scale, bias = scalar(self.model.logit_scale), scalar(self.model.logit_bias)
        # infinite where math.exp would raise, so that the next step can end the run by name
        found = {"logit_scale": torch.tensor(scale, dtype=torch.float64).exp().item(), "logit_bias": bias}
        for name, objective in self._named():
            found.update({f"{name}/{metric}": value for metric, value in objective.metrics().items()})
        return found

    def flops_per_sample(self, sizes: StepSizes) -> float:
        """Operations of a step for each sample, beside the towers' on image and text."""
        vision = sizes.model.vision
        teacher = image_flops(vision, vision.grid**2, passes=1.0) if self.teacher is not None else 0.0
        return teacher + sum(objective.flops_per_sample(sizes) for _, objective in self._named())

    def _named(self, names: Iterable[str] | None = None) -> list[tuple[str, Objective]]:
        chosen = self.objectives if names is None else names
        return [(name, cast(Objective, self.objectives[name])) for name in chosen]
