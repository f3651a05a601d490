"""Micro-batches with the gradient cache against one large batch: every gradient, ZeRO stage and number of ranks."""

import weakref
from contextlib import nullcontext, suppress

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import sigmoid_loss
from kernels.testing import assert_close
from siglip_train import engine as engines
from siglip_train import engine_state, loop
from siglip_train.batch import Batch, Images
from siglip_train.distributed.collectives import is_distributed
from siglip_train.distributed.setup import World
from siglip_train.errors import UserError
from siglip_train.gradient_cache import cached_step
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.base import Objective
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.parameter_groups import build_optimizer
from siglip_train.supervision.stop_signal import StopSignal
from tests.engine import test_engine as whole
from tests.objectives.tiny import tiny_batch, tiny_model
from tests.ranks import run_ranks

PAIRS = 12


class TextNorm(Objective):
    """By sample, with a head of its own; `noise` > 0 draws random numbers."""

    def __init__(self, *, weight: float = 1.0, dtype: torch.dtype = torch.float64, noise: float = 0.0):
        super().__init__(weight=weight)
        self.head = nn.Linear(16 if dtype == torch.float64 else 20, 1, dtype=dtype)
        self.noise = noise
        self.drawn: list[torch.Tensor] = []

    def forward(self, forward_pass):
        pooled = forward_pass.text.pooled
        if self.noise:
            self.drawn.append(torch.rand(3))
            pooled = pooled * (1 + self.noise * self.drawn[-1][0])
        by_sample = (self.head(pooled).square() + forward_pass.image.tokens.square().mean(dim=1)).mean(dim=1)
        return {"samples": by_sample.sum()}


class ImagePairs(Objective):
    """Pairs samples, of images alone, with a parameter of its own."""

    pairs_samples = True

    def __init__(self, *, weight: float = 1.0):
        super().__init__(weight=weight)
        self.power = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, forward_pass):
        images = forward_pass.image_embedding
        return {"samples": (images @ images.T).exp().mean(dim=1).sum() * self.power.sum()}


class PlainEngine:
    """The engine's interface without DeepSpeed, which has no float64: gradients are averaged over ranks."""

    def __init__(self, module):
        self.module = module
        self.steps = 0

    def __call__(self, *args):
        return self.module(*args)

    def backward(self, loss):
        loss.backward()

    def zero_optimization_stage(self):
        return 0

    def gradient_clipping(self):
        return 1e12

    def no_sync(self):
        return nullcontext()

    def allreduce_gradients(self):
        for parameter in self.module.parameters():
            if is_distributed() and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def step(self):
        self.steps += 1


class NoCheckpoints:
    last_step = None


def trainer(engine, micro_batch_size: int) -> loop.Trainer:
    """The parts of a run that a step touches."""
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = dict.fromkeys(loop.Trainer._fields)
    schedule = dict.fromkeys(loop.Schedule._fields) | {"micro_batch_size": micro_batch_size}
    parts |= {
        "engine": engine, "stop": StopSignal(), "checkpoints": NoCheckpoints(),
        "schedule": loop.Schedule(**schedule), "world": World(*ranks, 0, torch.device("cpu")),
    }  # fmt: skip
    return loop.Trainer(**parts)


@pytest.fixture
def one_process():
    """A process group of one, as every training has."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_gradients(found, expected, limit: float = 1e-12) -> None:
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        # the bias of the keys is invisible to softmax: its gradient is rounding noise round 0
        elif gradient.abs().max() > 1e-12:
            assert_close(torch.as_tensor(found[name]), gradient, limit, name)


OBJECTIVES = {
    "pairs": lambda: {"sigmoid": SigmoidLoss(weight=0.7)},
    "by sample": lambda: {"norm": TextNorm(weight=3.0)},
    "both": lambda: {"norm": TextNorm(weight=3.0), "sigmoid": SigmoidLoss(weight=0.7), "more": ImagePairs()},
    "images alone": lambda: {"more": ImagePairs()},
    "over ranks": lambda: {"norm": TextNorm(weight=3.0), "sigmoid": SigmoidLoss(weight=0.7)},
}


def build(objectives: str) -> TrainingModel:
    torch.manual_seed(0)
    return TrainingModel(tiny_model(), OBJECTIVES[objectives]())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("objectives", OBJECTIVES)
@pytest.mark.parametrize("micro_batch_size", [1, 4, 6])
def test_every_gradient_and_loss_is_that_of_the_whole_batch(objectives: str, micro_batch_size: int) -> None:
    plain, cached = build(objectives), build(objectives)
    expected, _ = loop.plain_step(trainer(PlainEngine(plain), PAIRS), tiny_batch(PAIRS), 1)
    found, _ = cached_step(trainer(PlainEngine(cached), micro_batch_size), tiny_batch(PAIRS), 1)
    assert_equal_gradients(gradients_of(cached), gradients_of(plain))
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-13)
    assert list(found.terms) == list(expected.terms)
    for name, term in expected.terms.items():
        assert found.terms[name].item() == pytest.approx(term.item(), rel=1e-13)
    assert float(found.gradient_norm) == pytest.approx(float(expected.gradient_norm), rel=1e-12)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("frozen", ["model.vision.", "model.text.", "model.vision.|model.text."])
def test_frozen_towers_stay_without_gradient(frozen: str) -> None:
    models = build("pairs"), build("pairs")
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(frozen.split("|"))))
    loop.plain_step(trainer(PlainEngine(models[0]), PAIRS), tiny_batch(PAIRS), 1)
    cached_step(trainer(PlainEngine(models[1]), 3), tiny_batch(PAIRS), 1)
    assert_equal_gradients(gradients_of(models[1]), gradients_of(models[0]))


def add_dropout(model, share: float = 0.2) -> None:
    """In the middle of both towers, where the released models have none."""
    for tower in (model.model.vision, model.model.text):
        tower.encoder.blocks[0].mlp.register_forward_hook(
            lambda _module, _inputs, output: nn.functional.dropout(output, share)
        )


def gradients_by_hand(model, micro_batch_size: int) -> dict[str, torch.Tensor]:
    """Every micro-batch keeps its graph, so that nothing has to be drawn twice."""
    inner, micro_batches = model.model, tiny_batch(PAIRS).split(micro_batch_size)
    parts = [
        (inner.encode_image(part.part("images")), inner.encode_text(part.part("texts")))
        for part in micro_batches
    ]
    images, texts = (torch.cat(side) for side in zip(*parts, strict=True))
    (0.7 * sigmoid_loss(images, texts, inner.logit_scale.exp(), inner.logit_bias)).backward()
    return gradients_of(model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("micro_batch_size", [2, 3])
def test_dropout_meets_the_same_masks_twice(micro_batch_size: int) -> None:
    by_hand, cached = build("pairs"), build("pairs")
    add_dropout(by_hand), add_dropout(cached)
    torch.manual_seed(5)
    expected = gradients_by_hand(by_hand, micro_batch_size)
    after = torch.rand(4)
    torch.manual_seed(5)
    cached_step(trainer(PlainEngine(cached), micro_batch_size), tiny_batch(PAIRS), 1)
    assert_equal_gradients(gradients_of(cached), expected)
    assert torch.equal(torch.rand(4), after), "the next step must draw other masks"


@pytest.mark.usefixtures("one_process")
def test_what_an_objective_draws_does_not_repeat_what_the_towers_drew() -> None:
    torch.manual_seed(0)
    norm = TextNorm(noise=0.1)
    model = TrainingModel(tiny_model(), {"norm": norm, "sigmoid": SigmoidLoss()})
    in_towers = []
    model.model.text.register_forward_hook(lambda *_: in_towers.append(torch.rand(3)))
    cached_step(trainer(PlainEngine(model), 4), tiny_batch(PAIRS), 1)
    first, second = in_towers[:3], in_towers[3:]
    assert all(map(torch.equal, first, second))
    assert len({tuple(draw.tolist()) for draw in [*first, *norm.drawn]}) == 6


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("option", ["checkpointing", "compiled"])
def test_options_of_the_blocks_keep_working(option: str) -> None:
    plain, cached = build("both"), build("both")
    loop.plain_step(trainer(PlainEngine(plain), PAIRS), tiny_batch(PAIRS), 1)
    if option == "checkpointing":
        engines.apply_speed_options(cached, engines.EngineConfig(activation_checkpointing=True))
    else:
        for tower in (cached.model.vision, cached.model.text):
            tower.encoder.blocks[0].compile(backend="aot_eager")  # needs no compiler on the machine
    cached_step(trainer(PlainEngine(cached), 4), tiny_batch(PAIRS), 1)
    assert_equal_gradients(gradients_of(cached), gradients_of(plain))


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes that autograd held for a backward pass at one time."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        super().__init__(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor):
        kept = type("Kept", (), {"tensor": tensor})()
        size = tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self._free, size)
        return kept

    def _free(self, size: int) -> None:
        self.now -= size


def peak_saved_bytes(take_step, pairs: int, micro_batch_size: int) -> int:
    run = trainer(PlainEngine(build("pairs")), micro_batch_size)
    saved = SavedBytes()
    with saved:
        take_step(run, tiny_batch(pairs), 1)
    return saved.peak


@pytest.mark.usefixtures("one_process")
def test_activations_of_one_micro_batch_are_held_and_not_those_of_the_batch() -> None:
    one_micro_batch = peak_saved_bytes(loop.plain_step, 4, 4)
    plain = peak_saved_bytes(loop.plain_step, 64, 64)
    cached = peak_saved_bytes(cached_step, 64, 4)
    assert plain > 10 * one_micro_batch
    # beside them the products' gradients, `[4, E]` twice
    assert cached < 1.1 * one_micro_batch


@pytest.mark.usefixtures("one_process")
def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    model = build("both")
    with torch.no_grad():
        model.objectives["norm"].head.bias.fill_(torch.nan)
    engine = PlainEngine(model)
    with pytest.raises(UserError, match="the loss of norm is not finite on rank 0 at step 7"):
        cached_step(trainer(engine, 4), tiny_batch(PAIRS), 7)
    assert engine.steps == 0


@pytest.mark.usefixtures("one_process")
def test_a_stop_signal_is_noticed() -> None:
    run = trainer(PlainEngine(build("both")), 4)
    assert cached_step(run, tiny_batch(PAIRS), 1)[1] is False
    run.stop.received = "SIGTERM"
    assert cached_step(run, tiny_batch(PAIRS), 2)[1] is True


class TokenPairs(Objective):
    pairs_samples = True

    def forward(self, forward_pass):
        return {"samples": forward_pass.image.tokens.sum()}


@pytest.mark.usefixtures("one_process")
def test_an_objective_that_pairs_more_than_embeddings_is_refused_in_a_line() -> None:
    model = TrainingModel(tiny_model(), {"tokens": TokenPairs()})
    with pytest.raises(UserError, match="set micro_batch_size=null"):
        cached_step(trainer(PlainEngine(model), 4), tiny_batch(PAIRS), 1)


def test_a_batch_splits_in_order_with_all_its_parts() -> None:
    images = Images(
        torch.arange(10).reshape(5, 2, 1), torch.zeros(5, 2, 2), torch.ones(5, 2, dtype=torch.bool)
    )
    batch = Batch(
        {"images": images, "texts": torch.arange(5)[:, None], "labels": torch.arange(5)}, tuple("abcde")
    )
    first, second, last = batch.split(2)
    assert [part.size for part in (first, second, last)] == [2, 2, 1]
    assert second.keys == ("c", "d")
    assert torch.equal(second.part("images").patches, images.patches[2:4])
    assert second.part("images").mask.shape == (2, 2)
    assert torch.equal(last.part("labels"), torch.tensor([4]))
    (bare,) = Batch({"images": Images(images.patches, images.grid)}).split(5)
    assert bare.part("images").mask is None


STAGES = [0, 1, 2, 3]
STEPS = 3


class Collectives(TorchDispatchMode):
    """How many collectives there were, and the bytes of those that reduce; sends and receives are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.reduced_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d.") and "send" not in name and "recv" not in name:
            self.calls += 1
            if "reduce" in name:
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                self.reduced_bytes += sum(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))


def deepspeed_engine(stage: int, precision: str):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    objectives = {"norm": TextNorm(weight=2.0, dtype=torch.float32), "sigmoid": SigmoidLoss()}
    model = TrainingModel(Siglip(whole.CONFIG), objectives)
    config = engines.deepspeed_config(
        engines.EngineConfig(zero_stage=stage, reduce_dtype=precision),
        world_size=dist.get_world_size(),
        precision=precision,
        micro_batch_size=whole.GLOBAL_BATCH // world_size,
        clip_norm=whole.OPTIM.clip_norm,
    )
    # without this ZeRO-3 would keep parameters as small as these whole on every rank
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    world = World(rank, world_size, rank, torch.device("cpu"))
    return engines.build_engine(model, build_optimizer(model, whole.OPTIM), config=config, world=world)


def history(take_step, stage: int, precision: str) -> dict:
    """Losses, norms and reduced bytes of a few steps, and the weights after them."""
    engine = deepspeed_engine(stage, precision)
    run, told = trainer(engine, 2), {"losses": [], "norms": [], "reduced_bytes": []}
    for step in range(STEPS):
        with Collectives() as counter:
            report, _ = take_step(run, whole.batch(step, dist.get_rank(), dist.get_world_size()), step + 1)
        told["losses"].append([report.total.item(), *(term.item() for term in report.terms.values())])
        told["norms"].append(float(report.gradient_norm))
        told["reduced_bytes"].append(counter.reduced_bytes)
    told["weights"] = engine_state.gather_weights(engine)
    engine.destroy()
    return told


def collectives_after_a_failure(stage: int) -> int:
    engine, counter = deepspeed_engine(stage, "fp32"), Collectives()
    total = engine(whole.batch(0, dist.get_rank(), dist.get_world_size())).total
    with counter, suppress(MemoryError), engines.one_reduction(engine):
        engine.backward(total)
        before = counter.calls
        raise MemoryError
    engine.destroy()
    return counter.calls - before


def compared(precision: str, stages: list[int]) -> list[list[dict]]:
    return [[history(step, stage, precision) for step in (loop.plain_step, cached_step)] for stage in stages]


def gradients_in_float64() -> dict[str, torch.Tensor]:
    model = build("over ranks")
    share = tiny_batch(PAIRS).split(PAIRS // dist.get_world_size())[dist.get_rank()]
    cached_step(trainer(PlainEngine(model), 2), share, 1)
    return gradients_of(model)


def on_a_rank(precisions: list[str], stages: list[int], failing_stages: list[int]) -> tuple:
    """All that is asked of ranks, as processes take longer to start than this takes."""
    failures = [collectives_after_a_failure(stage) for stage in failing_stages]
    return [compared(precision, stages) for precision in precisions], gradients_in_float64(), failures


def assert_equal_histories(plain: dict, cached: dict, limit: float) -> None:
    for key in ("losses", "norms"):
        torch.testing.assert_close(torch.tensor(cached[key]), torch.tensor(plain[key]), rtol=limit, atol=0)
    assert cached["reduced_bytes"] == plain["reduced_bytes"], "one reduction a step"


def assert_equal_weights(plain: dict, cached: dict, limit: float) -> None:
    for name, weight in plain.items():
        # the bias of the keys moves by Adam's normalised noise
        if not name.endswith("key.bias"):
            assert_close(torch.as_tensor(cached[name]), torch.as_tensor(weight), limit, name)


def check_ranks(world_size: int, precisions: list[str], stages: list[int], failing_stages: list[int]) -> None:
    limits = {"fp32": 1e-5, "bf16": 1e-2}  # measured for losses and norms: 3e-7, 3e-3
    whole_batch = build("over ranks")
    whole_batch(tiny_batch(PAIRS)).total.backward()
    for by_precision, gradients, failures in run_ranks(
        world_size, on_a_rank, precisions, stages, failing_stages
    ):
        assert_equal_gradients(gradients, gradients_of(whole_batch))
        for precision, by_stage in zip(precisions, by_precision, strict=True):
            for plain, cached in by_stage:
                assert_equal_histories(plain, cached, limits[precision])
        for plain, cached in by_precision[0]:
            # 1e-6 was measured
            assert_equal_weights(plain["weights"], cached["weights"], 1e-5)
        assert failures == [0] * len(failing_stages), "a rank that fails must not wait for the others"


@pytest.mark.dist
def test_two_ranks_at_stage_3_train_as_without_the_cache_and_a_failure_ends_at_once() -> None:
    check_ranks(2, ["fp32", "bf16"], [3], [3])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_zero_stage_and_number_of_ranks_trains_as_without_the_cache(world_size: int) -> None:
    check_ranks(world_size, ["fp32"], STAGES, [])


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_do_too_at_every_stage_and_bf16_stays_near_and_a_failure_ends_at_once() -> None:
    check_ranks(2, ["fp32", "bf16"], STAGES, STAGES)
