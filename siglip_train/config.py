"""The root of the configuration: nests what each consumer defines, and checks the parts against each other."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from siglip_train.checkpoints.carry_over import Part
from siglip_train.checkpoints.save import CheckpointConfig
from siglip_train.data.config import DataConfig
from siglip_train.data.tokenizer import TextRules
from siglip_train.distributed.setup import DistributedConfig
from siglip_train.engine import EngineConfig
from siglip_train.errors import UserError
from siglip_train.metrics import LogConfig
from siglip_train.models.adapters import AdapterConfig
from siglip_train.models.ema import EmaConfig
from siglip_train.models.siglip import SiglipConfig
from siglip_train.optim import OptimConfig
from siglip_train.typed import REQUIRED, build

# by the size of their vocabulary, and where they can be had
TOKENIZERS = {
    32000: "SigLIP has its own of 32,000 pieces, in google/siglip-base-patch16-224: tokenizer=PATH/spiece.model",
    250000: "mSigLIP has mC4's of 250,000 pieces, in google/siglip-base-patch16-256-multilingual: "
    "tokenizer=PATH/spiece.model",
    256000: "SigLIP 2 uses Gemma's, in google/siglip2-base-patch16-256: tokenizer=PATH/tokenizer.model",
}


@dataclass
class EvaluationConfig:
    """Evaluations inside a run.

    every_steps: optimizer steps from one to the next, 0 = at the end only. batch_size: rows that a rank embeds at once.
    tasks: what to measure, by names of your own; each has a `_target_`, which class it is, and that one's keys.
    `+evaluation@evaluation.tasks=NAME` brings those of a file, null leaves one out (or all).
    held_out: share of the training samples, by a hash of the key, that is not trained on: tasks whose `shards` are null
    measure it. Nothing is held out where no task does; of a source whose `select` says itself how much, that.
    """

    every_steps: int = 0
    batch_size: int = 64
    held_out: float = 0.0
    tasks: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.every_steps < 0 or self.batch_size < 1:
            raise ValueError("every_steps must not be negative and batch_size must be at least 1")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be a share in 0..1, below 1, got {self.held_out}")


@dataclass
class Config:
    """Everything `siglip-train` takes.

    tokenizer: a sentencepiece `.model`, a `.json` of the tokenizers library, or a folder with one; null = that of
    `init_from`, or none where no captions are read. total_samples: pairs at which the run ends, and its schedule unless
    `optim.schedule_samples` is set; those of a last partial step are made whole. total_epochs: in place of it, how
    often the run goes through the samples of all sources together. run_dir: where everything of the run is written,
    null = `outputs/DATE/TIME`. seed: of weights, order of data, augmentation and dropout. device: auto = a GPU where
    there is one. precision: of products in the model, weights stay in fp32; auto = bf16 on a GPU, fp32 on a CPU.
    stop_after_steps: end earlier, with a checkpoint, the schedule as if it went on. resume: auto = from the newest
    checkpoint in `run_dir`, if any; a run or a checkpoint = from there; null = never. objectives: the terms of the
    loss, by names of your own; each has a `_target_`, which class it is, and that one's keys. `sigmoid` is there unless
    it is set to null. ema: the teacher of the self-supervised ones, where there is one.

    global_batch_size: pairs whose negatives meet, per optimizer step, over all ranks. micro_batch_size: pairs that a
    rank takes through the towers at once, null = its whole share; where smaller, the gradient cache trains the same.
    init_from: a model to start from, in any format that `load_model` knows; what is null of `model`, `tokenizer`,
    `text_rules` and `data.resize` is as it has it. init_skip: beginnings of the names of parameters that it shall not
    give, `[text., logit_]` for a text tower of one's own, or of tensors of its own that are left over. carry_over: what
    to take of `init_from` where it is a run: `model`, always; `heads`, the modules of objectives, by name;
    `objectives`, what these keep and do not train (averages); `optimizer`, AdamW's moments, where a parameter that is
    new or resampled begins at step 0; `position`, the place in the data and in the schedule, from where `total_samples`
    and `optim.schedule_samples` count from the start of that run. adapters: LoRA on that model, null = none.
    """

    model: SiglipConfig
    data: DataConfig
    tokenizer: str | None
    global_batch_size: int
    total_samples: int | None = None
    total_epochs: float | None = None
    micro_batch_size: int | None = None
    run_dir: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    stop_after_steps: int | None = None
    resume: str | None = "auto"
    init_from: str | None = None
    init_skip: list[str] = field(default_factory=list)
    carry_over: list[Part] = field(default_factory=lambda: ["model"])
    adapters: AdapterConfig | None = None
    text_rules: TextRules = field(default_factory=TextRules)
    objectives: dict[str, Any] = field(default_factory=dict)
    ema: EmaConfig = field(default_factory=EmaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def samples(self) -> int:
        """`total_samples`, which total_epochs have become by the time that it is asked for."""
        assert self.total_samples is not None, "from_data.py counts epochs"
        return self.total_samples

    @property
    def total_steps(self) -> int:
        """Optimizer steps to the end of the run: ceil(total_samples / global_batch_size)."""
        return -(-self.samples // self.global_batch_size)

    @property
    def last_step(self) -> int:
        """The step at which the program ends, earlier than the schedule where `stop_after_steps` says so."""
        return min(self.total_steps, self.stop_after_steps or self.total_steps)


def parse(values: dict[str, Any]) -> Config:
    """Typed and cross-checked config from a composed one. Raises `UserError` with the key and the remedy."""
    _ask(values)
    config = build(Config, values)
    _check_sizes(config)
    _check_carry_over(config)
    if not config.objectives:
        raise UserError(
            "objectives: none given, there is nothing to train on; add +objective@objectives.sigmoid=sigmoid"
        )
    if config.tokenizer is not None and not Path(config.tokenizer).exists():
        raise UserError(f"tokenizer: there is no {config.tokenizer}")
    if config.adapters is not None and config.init_from is None:
        raise UserError("adapters: they adapt a trained model, so init_from=PATH is needed")
    if not config.optim.decay_pretrained and config.init_from is None:
        raise UserError("optim.decay_pretrained=false: it spares loaded weights, so init_from=PATH is needed")
    return config


def _ask(values: dict[str, Any]) -> None:
    """What every run needs and no recipe can know, in one message, a line each."""
    asked = []
    if values.get("init_from") == REQUIRED:
        asked.append("init_from: none given; a run or a folder of a trained model: init_from=PATH")
    if values.get("init_skip") and values.get("init_from") is None:
        asked.append("init_from: none given, of which init_skip leaves out a part: init_from=RUN_OR_FOLDER")
    if values.get("tokenizer", REQUIRED) == REQUIRED:
        vocabulary = values.get("model", {}).get("text", {}).get("vocab_size", 0)
        whose = TOKENIZERS.get(vocabulary, "a .model, a tokenizer.json or a folder with one: tokenizer=PATH")
        asked.append(f"tokenizer: none given; {whose}")
    if not values.get("data", {}).get("sources"):
        asked.append(
            "data.sources: no source of training data; give data.sources.NAME.shards='/data/web/*.tar', or "
            "data.sources.NAME.folder=/data/images"
        )
    if asked:
        raise UserError("\n".join(asked))


def _check_sizes(config: Config) -> None:
    if (config.total_samples is None) == (config.total_epochs is None):
        given = (
            "neither is given" if config.total_samples is None else "both are given; set one of them to null"
        )
        raise UserError(f"total_samples and total_epochs: one of them says how long to train, and {given}")
    for name in ("global_batch_size", "total_samples", "stop_after_steps", "micro_batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            other = "" if name in ("global_batch_size", "total_samples") else " or null"
            raise UserError(f"{name}: must be at least 1{other}, got {value}")
    if config.total_epochs is not None and config.total_epochs <= 0:
        raise UserError(f"total_epochs: must be above 0, got {config.total_epochs}")
    if config.total_samples is None:
        return
    length, warmup = config.optim.length(config.total_samples), config.optim.warmup(config.total_samples)
    name = "total_samples" if config.optim.schedule_samples is None else "optim.schedule_samples"
    if length < config.total_samples:
        raise UserError(
            f"optim.schedule_samples={length} ends before total_samples={config.total_samples}: set at least as "
            "many, or null for the same"
        )
    if warmup >= length:
        raise UserError(f"optim.warmup_samples={warmup} leaves nothing of {name}={length}")


def _check_carry_over(config: Config) -> None:
    parts = config.carry_over
    if "model" not in parts:
        raise UserError(
            f"carry_over: [{', '.join(parts)}] leaves out the model, which all else belongs to: carry_over=[model, …], "
            "or init_from=null to take nothing"
        )
    if {*parts} == {"model"}:
        return
    if config.init_from is None:
        raise UserError(f"carry_over: [{', '.join(parts)}] of no run; give init_from=RUN_DIR")
    restarts = "position" in parts and "optimizer" not in parts
    if restarts and config.total_samples is not None and config.optim.warmup(config.total_samples):
        raise UserError(
            "carry_over: position without optimizer would restart AdamW with zero moments after its warm-up: add "
            "optimizer, or set optim.warmup_samples=0"
        )
