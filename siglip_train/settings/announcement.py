"""What the log says of a run before its first step: model, steps, ranks, data, and what to expect."""

import logging
from collections.abc import Sequence
from typing import Any

from siglip_train import engine
from siglip_train.checkpoints.write import MODEL_PREFIX, Progress
from siglip_train.config import Config
from siglip_train.distributed.setup import World
from siglip_train.interop.native import parameter_shapes
from siglip_train.models.published import likeness
from siglip_train.objectives.sigmoid import expected_initial_loss
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.optim import lr_for_batch

log = logging.getLogger(__name__)


def announce(
    config: Config,
    world: World,
    model: TrainingModel,
    precision: str,
    data: Sequence[str],
    progress: Progress,
) -> None:
    """Log what is trained, by how many steps, on what. data: lines about the sources."""
    title, note = likeness(config.model)
    size = sum(shape.numel() for shape in parameter_shapes(config.model).values())
    log.info("%s: %.1f M parameters, %s", title, size / 1e6, note)
    count, trained = engine.parameter_counts(model)
    log.info(
        "%d steps of %d pairs, %d rank%s on %s, ZeRO %d, %s%s",
        config.total_steps,
        config.global_batch_size,
        world.world_size,
        "" if world.world_size == 1 else "s",
        world.device.type,
        config.engine.stage(world.world_size),
        precision,
        "" if trained == count else f"; {trained / 1e6:.3g} M of {count / 1e6:.4g} M parameters are trained",
    )
    for name, objective in model.objectives.items():
        if own := engine.parameter_counts(objective)[0]:
            log.info("objective %s: %.3g M parameters of its own", name, own / 1e6)
    for line in (*data, *_expected(config, progress)):
        log.info(line)


def announce_usual_lr(config: Config, written: dict[str, Any]) -> None:
    """Log the usual learning rate if the global batch differs from the experiment's file and the rate does not."""
    batch, lr = config.global_batch_size, config.optim.lr
    if batch != written["global_batch_size"] and lr == written["optim"]["lr"]:
        log.info(
            "global_batch_size is %d instead of %d: by the square-root rule, usual with Adam, optim.lr=%.3g would go "
            "with it; %.3g stays",
            batch,
            written["global_batch_size"],
            lr_for_batch(lr, batch, written["global_batch_size"]),
            lr,
        )


def _expected(config: Config, progress: Progress) -> list[str]:
    """The loss that a sigmoid objective begins near, unless a checkpoint or `init_from` gave scale and bias."""
    if config.objectives.get("sigmoid") is None or not begins_unlearned(progress):
        return []
    expected = expected_initial_loss(config.global_batch_size)
    return [f"a sigmoid loss near {expected:.2f} is to be expected at the start"]


def begins_unlearned(progress: Progress) -> bool:
    """Whether scale and bias still have their initial values, and not those of a checkpoint or of `init_from`."""
    given = {name.removeprefix(MODEL_PREFIX) for name in progress.pretrained}
    return progress.step == 0 and given.isdisjoint(("logit_scale", "logit_bias"))
