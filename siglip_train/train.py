"""The entry point of training: read the config, build every part in plain sight, call the loop."""

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.optim import AdamW

from siglip_train import engine, engine_state, loop
from siglip_train.checkpoints import carry_over
from siglip_train.checkpoints.carry_over import Start
from siglip_train.checkpoints.load import check_moments, read_checkpoint, restore_weights
from siglip_train.checkpoints.resume import choose_checkpoint
from siglip_train.checkpoints.save import Checkpoints
from siglip_train.checkpoints.write import Progress
from siglip_train.composition import instantiate_all, plain, run_hydra
from siglip_train.config import Config, parse
from siglip_train.data.batch_pieces import RankShare
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.inputs.base import RunInputs
from siglip_train.data.inputs.captions import CaptionInput
from siglip_train.data.inputs.embeddings import stands_in
from siglip_train.data.pipeline import build_loader
from siglip_train.data.sentences import SentenceForm
from siglip_train.data.tokenizer import Tokenizer, load_tokenizer
from siglip_train.distributed.collectives import any_rank, barrier
from siglip_train.distributed.setup import World, init_world, leave_world, use_timeout_everywhere
from siglip_train.distributed.slow_ranks import SlowRank
from siglip_train.embedding_cache import embed_images, folder_of
from siglip_train.errors import UserError, exit_on_user_error, said
from siglip_train.evals.base import Encoder, Evaluator, check_all, flat_metrics, run_all, write_evaluations
from siglip_train.evals.table import result_tables
from siglip_train.gradient_cache import cached_step
from siglip_train.interop.native import Description, write_export
from siglip_train.metrics import MetricWriter
from siglip_train.models.adapters import add_adapters, merged
from siglip_train.models.flops import flops_per_pair, passes
from siglip_train.models.siglip import Siglip
from siglip_train.objective_gradients import measured_step
from siglip_train.objectives.base import StepSizes
from siglip_train.objectives.captioner import Captioner
from siglip_train.objectives.captioning import Captioning
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.parameter_groups import build_optimizer
from siglip_train.progress_display import ProgressDisplay
from siglip_train.report import write_report
from siglip_train.run_dir import (
    earlier_config,
    forget_done,
    kept_tokenizer,
    open_run_dir,
    read_done,
    write_config,
    write_done,
)
from siglip_train.runtime import check_kernels_package, seed_everything
from siglip_train.settings import starting_point
from siglip_train.settings.announcement import announce, announce_usual_lr
from siglip_train.settings.from_data import fill_from_data
from siglip_train.settings.keys import print_keys
from siglip_train.settings.starting_point import Filled
from siglip_train.supervision.same_program import check_same_program
from siglip_train.supervision.watch import Supervision, supervised

log = logging.getLogger("siglip_train")

OPEN_GROUPS = (
    *("adapters.", "data.sources.", "data.source_defaults", "evaluation.tasks.", "objectives."),
    "optim.lr_by_width",
)


@exit_on_user_error
def main() -> None:
    """`siglip-train [experiment=NAME] [key=value …]`, or `siglip-train --keys [PREFIX]`."""
    if print_keys(Config, sys.argv[1:]):
        return
    check_kernels_package()
    run_hydra(
        lambda raw, written: run(plain(raw), None if written is None else plain(written)),
        config_name="train",
        config_class=Config,
        open_groups=OPEN_GROUPS,
    )


def run(values: dict[str, Any], written: dict[str, Any] | None = None) -> None:
    """Train as the composed config `values` says; written: what its experiment says alone. All ranks."""
    started = starting_point.fill(values)
    config = parse(started.values)
    with supervised(config.distributed, config.run_dir) as watch:
        _run(started, config, written, watch)


def _run(started: Filled, config: Config, written: dict[str, Any] | None, watch: Supervision) -> None:
    values, config, world, run_dir = _begin(started, config, watch)
    if _is_done(config, world, run_dir, watch):
        return
    seed_everything(config.seed)
    precision = _precision(config, world)
    share = RankShare(config.global_batch_size, world.rank, world.world_size)
    take_step = _take_step(config, share)

    tokenizer, transform = _text_and_image_input(config)
    tasks = instantiate_all(config.evaluation.tasks, "evaluation.tasks")
    check_all(tasks, "evaluation.tasks")
    model = _training_model(config)
    description = _description(config, run_dir, transform)
    start = _load_weights(model, config, run_dir, description)
    if start.progress.step < config.total_steps:
        forget_done(run_dir)
    engine.apply_speed_options(model, config.engine)
    optimizer = _optimizer(model, config, start, world)

    embeddings = folder_of(model.model.vision, config.data, transform, precision)
    kinds = model.inputs if embeddings is None else stands_in(model.inputs)
    loader = build_loader(
        config.data,
        inputs=RunInputs(kinds, transform, tokenizer, embeddings),
        share=share,
        seed=config.seed,
        state=start.progress.loader,
        pin_memory=world.device.type == "cuda",
    )
    schedule = _schedule(config, share, model)
    deepspeed_config = _deepspeed_config(config, precision, share, model)
    wrapped = engine.build_engine(model, optimizer, config=deepspeed_config, world=world)
    use_timeout_everywhere(config.distributed)
    engine_state.restore_moments(wrapped, start.moments)
    # they take as much memory as two models
    start = start._replace(moments={})

    encoder = Encoder(
        model=model.model,
        tokenizer=tokenizer or _no_tokenizer,
        transform=transform,
        world=world,
        precision=precision,
        batch_size=config.evaluation.batch_size,
        workers=config.data.worker_count,
        scalar_of=lambda parameter: engine_state.scalar(wrapped, parameter),
        on_batch=_on_batch(watch),
        heads=dict(model.objectives.items()),
        captioner=lambda: _captioner(model, config, tokenizer),
        whole=wrapped,
        data=config.data,
    )
    trainer = loop.Trainer(
        engine=wrapped,
        take_step=take_step,
        loader=loader,
        optim=config.optim,
        schedule=schedule,
        world=world,
        checkpoints=_checkpoints(config, run_dir, description, start),
        writer=_writer(config, world, run_dir, values, start.progress),
        display=_display(config, world, start.progress),
        stop=watch.stop,
        standing=watch.standing,
        slow_rank=SlowRank(config.distributed.slow_rank_excess, config.distributed.slow_rank_logs),
        evaluate=lambda step: _evaluate(tasks, encoder, run_dir, step),
    )
    announce(config, world, model, precision, loader.outlook(config.samples), start.progress)
    if written is not None:
        announce_usual_lr(config, written)
    prepare = partial(embed_images, loader, encoder, embeddings) if embeddings is not None else None
    _finish(_train(trainer, start.progress, prepare), config, world, run_dir, watch)


class _Begun(NamedTuple):
    values: dict[str, Any]
    config: Config
    world: World
    run_dir: Path


def _begin(started: Filled, config: Config, watch: Supervision) -> _Begun:
    """Open the folder of the run, and fill what its config leaves to the data. All ranks."""
    world = init_world(config.device, config.distributed, met=watch.met)
    check_same_program(started.values, None if config.tokenizer is None else Path(config.tokenizer))
    run_dir = open_run_dir(config.run_dir, world, watch.log)
    values, notes = fill_from_data(started.values, config, earlier_config(run_dir), watch.standing.move)
    config = parse(values)
    write_config(run_dir, values)
    for note in (*started.notes, *notes):
        log.info(note)
    return _Begun(values, config, world, run_dir)


def _is_done(config: Config, world: World, run_dir: Path, watch: Supervision) -> bool:
    """Whether DONE says that nothing is left to do; if so, write the report once more and end the run. All ranks."""
    samples, steps = read_done(run_dir)
    if config.resume != "auto" or steps < config.total_steps:
        return False
    log.info("%s is done, as its DONE says; a larger total_samples lets it go on", run_dir)
    _finish(Progress(steps, samples), config, world, run_dir, watch)
    return True


def _finish(progress: Progress, config: Config, world: World, run_dir: Path, watch: Supervision) -> None:
    """Write DONE if all samples are seen, write the report, and leave the process group. All ranks."""
    watch.standing.at("end")
    watch.ended = f"ended: {progress.samples_seen} of {config.total_samples} samples seen"
    if world.is_main:
        try:
            if progress.step >= config.total_steps:
                write_done(run_dir, samples=progress.samples_seen, steps=progress.step)
            report: str | Path = write_report(run_dir)
        except OSError as error:
            report = f"none, {said(error)}"
        log.info("%d of %d samples seen; report: %s", progress.samples_seen, config.samples, report)
    barrier()
    leave_world()


def _train(trainer: loop.Trainer, progress: Progress, prepare: Callable[[], None] | None) -> Progress:
    """`prepare`, which a stop signal may end, and `loop.train`; then close what the run writes to. All ranks."""
    try:
        if prepare is not None:
            prepare()
        trainer.display.start()
        return loop.train(trainer, progress)
    except loop.StopTraining:
        log.info("%s: leaving before the next step", trainer.stop.received or "stop signal on a rank")
        return progress
    finally:
        trainer.display.close()
        if trainer.writer is not None:
            trainer.writer.close()


def _text_and_image_input(config: Config) -> tuple[Tokenizer | None, ImageTransform]:
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, config.text_rules, config.model.text.context_length)
        _check_vocabulary(tokenizer, config)
    transform = ImageTransform(
        config.model.vision.image_size,
        config.model.vision.patch_size,
        config.data.resize,
        flip=config.data.flip,
        min_crop_area=config.data.min_crop_area,
        reduced_jpeg=config.data.reduced_jpeg,
    )
    return tokenizer, transform


def _no_tokenizer(texts: list[str]) -> Tensor:
    raise UserError(f"{texts[0]!r} needs a tokenizer to be evaluated: tokenizer=PATH")


def _captioner(model: TrainingModel, config: Config, tokenizer: Tokenizer | None) -> Captioner:
    """The decoder that the run trains, as evaluations use it."""
    decoders = [each.decoder for each in model.objectives.values() if isinstance(each, Captioning)]
    if len(decoders) != 1 or tokenizer is None:
        raise UserError(
            f"a task needs the decoder of objective captioning, and the run trains {len(decoders)}"
        )
    return Captioner(decoders[0], SentenceForm(config.data.sentences, tokenizer), any_rank)


def _load_weights(model: TrainingModel, config: Config, run_dir: Path, description: Description) -> Start:
    """Load weights from the checkpoint to resume or from `init_from`, if any; return the state that belongs to them.

    Adapters are put beside the layers on the way: a checkpoint has theirs, what `init_from` names has none.
    """
    found = choose_checkpoint(config.resume, run_dir)
    if found is not None:
        saved = read_checkpoint(found)
        _add_adapters(model, config)
        restore_weights(model, saved, found)
        log.info("resuming from %s: %d samples seen", found, saved.progress.samples_seen)
        return Start(saved.progress, saved.moments, is_resumed=True)
    start = Start(Progress())
    if config.init_from is not None:
        start = carry_over.start_from(
            config.init_from,
            model,
            parts=config.carry_over,
            skip=config.init_skip,
            inputs=description,
            lengths=carry_over.Lengths(config.global_batch_size, config.samples),
        )
    _add_adapters(model, config)
    return start


def _optimizer(model: TrainingModel, config: Config, start: Start, world: World) -> AdamW:
    """AdamW by the rules, in groups of parameters that have had equally many updates; rules may freeze parameters."""
    steps = engine_state.steps_of(start.moments)
    optimizer = build_optimizer(
        model, config.optim, start.progress.pretrained, steps, fused=world.device.type == "cuda"
    )
    if start.is_resumed:
        check_moments(model, start.moments)
    elif start.moments or start.dropped:
        log.info(carry_over.outlook(model, start))
    return optimizer


def _add_adapters(model: TrainingModel, config: Config) -> None:
    if config.adapters is not None:
        if model.teacher is not None and config.ema.scope == "tower_and_head":
            raise UserError(
                "adapters: the teacher of self-distillation follows every weight of the tower, and adapters leave most "
                "as they are: set ema.scope=head, so that it has heads alone, or adapters=null"
            )
        add_adapters(model.model, config.adapters)


def _check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    if tokenizer.vocab_size > config.model.text.vocab_size:
        raise UserError(
            f"the tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens and model.text.vocab_size is "
            f"{config.model.text.vocab_size}: set model.text.vocab_size={tokenizer.vocab_size} or more"
        )


def _precision(config: Config, world: World) -> Literal["bf16", "fp32"]:
    if config.precision == "auto":
        return "bf16" if world.device.type == "cuda" else "fp32"
    return config.precision


def _micro_batch_size(config: Config, share: RankShare) -> int:
    size = config.micro_batch_size or share.size
    if share.size % size:
        raise UserError(
            f"micro_batch_size: {size} does not divide the {share.size} pairs of a rank (global_batch_size "
            f"{config.global_batch_size}, ranks: {share.world_size}); give a divisor of it, or null for all at once"
        )
    return size


def _on_batch(watch: Supervision) -> Callable[[], None]:
    """Called between the batches of an evaluation on all ranks, so that a stop signal need not wait for its end."""

    def moved() -> None:
        watch.standing.move()
        if any_rank(watch.stop.received is not None):
            raise loop.StopTraining

    return moved


def _evaluate(tasks: dict[str, Evaluator], encoder: Encoder, run_dir: Path, step: int) -> dict[str, float]:
    """Run the tasks on all ranks; their details go to `evaluations/<task>.json` for the report."""
    evaluations = run_all(tasks, encoder)
    if encoder.world.is_main and evaluations:
        try:
            write_evaluations(run_dir / "evaluations", evaluations, step=step)
        except OSError as error:
            log.warning("the report will lack the details of this evaluation: %s", said(error))
        log.info("evaluation at step %d\n%s", step, result_tables(evaluations))
    return {f"val/{name}": value for name, value in flat_metrics(evaluations).items()}


def _training_model(config: Config) -> TrainingModel:
    return TrainingModel(
        Siglip(config.model),
        instantiate_all(config.objectives, "objectives"),
        ema=config.ema,
        global_batch_size=config.global_batch_size,
    )


def _description(config: Config, run_dir: Path, transform: ImageTransform) -> Description:
    """What stands beside exported weights; the run keeps the tokenizer. All ranks."""
    return Description(
        config.model,
        tokenizer=None if config.tokenizer is None else kept_tokenizer(run_dir, config.tokenizer),
        rules=config.text_rules,
        resize=transform.resize,
    )


def _deepspeed_config(
    config: Config, precision: Literal["bf16", "fp32"], share: RankShare, model: TrainingModel
) -> dict[str, Any]:
    return engine.deepspeed_config(
        config.engine,
        world_size=share.world_size,
        precision=precision,
        micro_batch_size=share.size,
        clip_norm=config.optim.clip_norm,
        has_teacher=model.teacher is not None,
    )


def _take_step(config: Config, share: RankShare) -> loop.TakeStep:
    is_cached = _micro_batch_size(config, share) < share.size
    every = config.log.objective_gradient_every
    if every and (is_cached or config.engine.zero_stage == 3):
        remedy = "micro_batch_size=null" if is_cached else "engine.zero_stage=2 or lower"
        what = "the gradient cache" if is_cached else "ZeRO 3"
        raise UserError(
            f"log.objective_gradient_every: {what} keeps no graph that the gradient of each objective could be taken "
            f"of; set {remedy}, or log.objective_gradient_every=0"
        )
    if every:
        return partial(measured_step, every=every)
    return cached_step if is_cached else loop.plain_step


def _schedule(config: Config, share: RankShare, model: TrainingModel) -> loop.Schedule:
    return loop.Schedule(
        global_batch_size=config.global_batch_size,
        micro_batch_size=_micro_batch_size(config, share),
        total_samples=config.samples,
        last_step=config.last_step,
        log_every=config.log.every_steps,
        evaluate_every=config.evaluation.every_steps,
        flops_per_pair=_flops_per_pair(config, model)
        + model.flops_per_sample(StepSizes(config.model, config.data.views)),
        seed=config.seed,
    )


def _checkpoints(config: Config, run_dir: Path, description: Description, start: Start) -> Checkpoints:
    checkpoints = Checkpoints(
        run_dir,
        config.checkpoint,
        lambda folder, state: write_export(folder, merged(state, config.adapters), description),
        config.global_batch_size,
    )
    checkpoints.last_step = start.progress.step if start.is_resumed else None
    return checkpoints


def _writer(
    config: Config, world: World, run_dir: Path, values: dict[str, Any], progress: Progress
) -> MetricWriter | None:
    if not world.is_main:
        return None
    return MetricWriter(run_dir, config.log, resumed_step=progress.step, run_config=values)


def _display(config: Config, world: World, progress: Progress) -> ProgressDisplay:
    return ProgressDisplay(
        total_steps=config.last_step,
        start_step=progress.step,
        is_main=world.is_main,
        is_terminal=sys.stderr.isatty(),
    )


def _flops_per_pair(config: Config, model: TrainingModel) -> float:
    """FLOPs of the towers for one pair. Call it after the rules have frozen parameters."""
    return flops_per_pair(
        config.model,
        vision_passes=passes(model.model.vision) if config.data.embedding_dir is None else 0.0,
        text_passes=passes(model.model.text) if CaptionInput in model.inputs else 0.0,
    )


if __name__ == "__main__":
    main()
