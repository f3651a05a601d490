"""What a run takes over from the run that `init_from` names, so that the stages of a recipe are a chain of runs.

Besides the model these are the heads and the state of objectives, AdamW's moments (all by name), and the position in
the data and in the schedule.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from siglip_train.checkpoints.load import read_heads, read_moments, read_progress
from siglip_train.checkpoints.resume import fault_on_any_rank
from siglip_train.checkpoints.write import MODEL_PREFIX, Progress
from siglip_train.distributed.collectives import on_main
from siglip_train.engine_state import steps_of
from siglip_train.errors import UserError
from siglip_train.interop.files import shortened
from siglip_train.interop.load import load_weights
from siglip_train.interop.native import Description
from siglip_train.interop.runs import newest_checkpoint
from siglip_train.models.patches import resize_patch_kernel
from siglip_train.models.positions import resize_position_table
from siglip_train.objectives.training_model import TrainingModel

log = logging.getLogger(__name__)

Part = Literal["model", "heads", "objectives", "optimizer", "position"]
PARTS: tuple[str, ...] = get_args(Part)

# init_skip entries with this prefix are meant for what objectives own, all others for the model
_OBJECTIVES = "objectives."
_TEACHERS_TOWER = "teacher.copies.vision."


class Start(NamedTuple):
    """The state that a run starts or continues with, apart from the weights, which are in the model.

    moments: AdamW's state by parameter name; a parameter that is not named starts at step 0 with moments of zero.
    dropped: names of parameters whose moments the source has and this run does not take. is_resumed: the run continues
    from a checkpoint of its own.
    """

    progress: Progress
    moments: Mapping[str, Tensor] = {}
    dropped: Sequence[str] = ()
    is_resumed: bool = False


class Lengths(NamedTuple):
    """Two keys of the config of the run that starts, in pairs."""

    global_batch_size: int
    total_samples: int


def start_from(
    source: str,
    model: TrainingModel,
    *,
    parts: Collection[str],
    skip: Sequence[str] = (),
    inputs: Description | None = None,
    lengths: Lengths,
) -> Start:
    """Load the model of `source`, in any format, and of a run `parts` of the rest; say what was taken.  # all ranks

    skip: prefixes of names of parameters that keep their initial values, in the model (`text.`) or in objectives
    (`objectives.NAME.`). inputs: how this run reads texts and images, see `load_weights`.
    The result holds AdamW's state of those parameters that kept their values; the optimizer is grouped by it.
    Raises `UserError` where `source` lacks what is asked for, or has it in another shape.
    """
    checkpoint = None if {*parts} == {"model"} else _checkpoint_in(source, parts)
    takes_own = not {"heads", "objectives"}.isdisjoint(parts)
    skip_own = [beginning for beginning in skip if takes_own and beginning.startswith(_OBJECTIVES)]
    skip = [beginning for beginning in skip if beginning not in skip_own]
    report = load_weights(model.model, checkpoint or source, skip=skip, inputs=inputs)
    log.info("init_from %s: %s", checkpoint or source, report)
    loaded, resampled = (
        [MODEL_PREFIX + name for name in names] for names in (report.loaded, report.resampled)
    )
    progress = Progress(pretrained=(*loaded, *resampled))
    if checkpoint is None:
        model.start_teacher()
        return Start(progress)
    own = _take_own(model, checkpoint, parts, skip_own) if takes_own else []
    model.start_teacher(loaded=own)
    kept = {*loaded, *own}
    moments = read_moments(checkpoint) if "optimizer" in parts else {}
    if "position" in parts:
        progress = _moved_to(read_progress(checkpoint), lengths)
        log.info(
            "position from %s: %d samples seen, step %d", checkpoint, progress.samples_seen, progress.step
        )
    return Start(
        progress,
        {name: tensor for name, tensor in moments.items() if _parameter(name) in kept},
        sorted({*map(_parameter, moments)} - kept),
    )


def _parameter(moment: str) -> str:
    return moment.rpartition(".")[0]


def _checkpoint_in(source: str, parts: Collection[str]) -> Path:
    """The checkpoint that `source` is, or the newest of that run, whole and alike on all ranks.  # all ranks"""
    checkpoint = on_main(partial(newest_checkpoint, Path(source).expanduser()))
    if not on_main((checkpoint / "state.json").is_file):
        others = ", ".join(part for part in parts if part != "model")
        raise UserError(
            f"carry_over: {source} is a model without the rest of a run, so it has none of {others}: give a run or one "
            "of its checkpoints (init_from=RUN_DIR), or carry_over=[model]"
        )
    fault = fault_on_any_rank(checkpoint)
    if fault is not None:
        raise UserError(f"init_from: the checkpoint {checkpoint} is damaged: {fault}; choose another")
    return checkpoint


def _take_own(model: nn.Module, checkpoint: Path, parts: Collection[str], skip: Sequence[str]) -> list[str]:
    """Load what objectives own where `parts` asks for it and the checkpoint has it; return the names loaded."""
    # a table that a decoder shares with the text tower is the model's, under whichever name
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, _ in model.named_parameters()}
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(MODEL_PREFIX) and name not in shared
    }
    # the file also holds layers with adapters, which the model has in merged form
    theirs = {
        name: tensor for name, tensor in read_heads(checkpoint).items() if not name.startswith(MODEL_PREFIX)
    }
    for beginning in skip:
        if not any(name.startswith(beginning) for name in (*own, *theirs)):
            raise UserError(f"init_skip: nothing begins with {beginning!r}, neither here nor in {checkpoint}")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = [
        name
        for name in own
        if ("heads" if name in trained else "objectives") in parts and not name.startswith(tuple(skip))
    ]
    taken = {name: _fitted(name, theirs[name], own[name].shape) for name in wanted if name in theirs}
    for name, tensor in taken.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"carry_over: {name} is {list(tensor.shape)} in {checkpoint} and {list(own[name].shape)} here; to let "
                f"it start from initial values, init_skip=[{name}]"
            )
    model.load_state_dict(taken, strict=False)
    initial, dropped = sorted(own.keys() - taken.keys()), sorted(theirs.keys() - taken.keys())
    line = [f"{len(taken)} tensors of heads and objectives loaded"]
    line += [f"{len(initial)} start from initial values: {shortened(initial)}"] if initial else []
    line += [f"{len(dropped)} dropped: {shortened(dropped)}"] if dropped else []
    log.info("carry_over from %s: %s", checkpoint, "; ".join(line))
    return list(taken)


def _fitted(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The teacher's positions and stem at another image or patch size, resampled as those of the student are."""
    if tensor.shape == shape or not name.startswith(_TEACHERS_TOWER):
        return tensor
    if name == f"{_TEACHERS_TOWER}position_table":
        return resize_position_table(tensor, math.isqrt(shape[0]))
    if name == f"{_TEACHERS_TOWER}patch_embedding.weight":
        return resize_patch_kernel(tensor, math.isqrt(shape[1] // 3)).to(tensor.dtype)
    return tensor


def _moved_to(progress: Progress, lengths: Lengths) -> Progress:
    """The position of the previous run, in steps of this one."""
    seen, size = progress.samples_seen, lengths.global_batch_size
    if seen % size:
        raise UserError(
            f"carry_over: the position is {seen} samples, which global_batch_size={size} does not divide; choose "
            "another batch, or leave position out of carry_over"
        )
    if seen >= lengths.total_samples:
        raise UserError(
            f"total_samples={lengths.total_samples}: with the position carried it counts from the start of the recipe, "
            f"and init_from has seen {seen} already; set a larger one, or leave position out of carry_over"
        )
    return progress._replace(step=seen // size)


def outlook(model: nn.Module, start: Start) -> str:
    """One line for the log on how AdamW continues. Call it after the rules have frozen parameters."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    steps = steps_of(start.moments)
    old, new = [name for name in trained if name in steps], [name for name in trained if name not in steps]
    dropped = {*start.dropped, *(steps.keys() - trained)}
    counts = sorted({steps[name] for name in old})
    parts = [f"{len(old)} parameters continue with their moments"]
    if counts:
        parts[0] += f", after {' or '.join(map(str, counts))} updates"
    if new:
        parts.append(f"{len(new)} at step 0 in groups of their own: {shortened(new)}")
    if dropped:
        parts.append(f"{len(dropped)} whose moments are dropped: {shortened(dropped)}")
    return "AdamW: " + "; ".join(parts)
