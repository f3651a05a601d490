"""Self-distillation and masked prediction: each restated in float64, then on ranks, ZeRO stages and with the cache.

The teacher and the centres are followed by hand over the same steps.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from siglip_train import engine_state
from siglip_train.batch import Batch, Images
from siglip_train.data.image_transform import patch_grid
from siglip_train.data.inputs.views import Views
from siglip_train.errors import UserError
from siglip_train.models.ema import EmaConfig, usual_momentum
from siglip_train.models.siglip import Siglip
from siglip_train.models.vision import VisionTower
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.masked_prediction import MaskedPrediction
from siglip_train.objectives.self_distillation import SelfDistillation
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.parameter_groups import build_optimizer
from tests.engine import test_engine as whole
from tests.objectives.test_lifecycle import STEPS, through_a_resume
from tests.ranks import run_ranks
from tests.test_gradient_cache import trainer

# odd sizes, which no number of ranks divides
HEAD = {"width": whole.CONFIG.vision.width, "hidden": 13, "bottleneck": 7, "prototypes": 11}
EMA = EmaConfig(momentum=0.75)
LOCAL = 3


def training_model(ema: EmaConfig = EMA) -> TrainingModel:
    torch.manual_seed(0)
    objectives = {
        "sigmoid": SigmoidLoss(),
        "distillation": SelfDistillation(weight=0.5, **HEAD),
        "masked": MaskedPrediction(weight=0.25, **HEAD),
    }
    model = TrainingModel(Siglip(whole.CONFIG), objectives, ema=ema)
    # another than the student from the start, or a teacher that is mixed up with it would not be noticed
    generator = torch.Generator().manual_seed(1)
    for parameter in model.teacher.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """That of the engine's tests, with views: the global one of 4 patches, local ones of 1."""
    size, generator = whole.GLOBAL_BATCH, torch.Generator().manual_seed(100 + step)
    share = slice(rank * size // world_size, (rank + 1) * size // world_size)
    levels = torch.randint(0, 256, (size, 4 + LOCAL, 192), generator=generator, dtype=torch.uint8)
    grid = patch_grid(2, 2).expand(size, 4, 2)
    local = Images(levels[:, 4:, None], torch.zeros(size, LOCAL, 1, 2, dtype=torch.int64))
    masked = torch.rand(size, 4, generator=generator).argsort(1)[:, :2].sort(1).values
    views = Views(Images(levels[:, :4], grid), local, masked)
    given = whole.batch(step, rank, world_size)
    return Batch({**given.parts, "views": Batch({"views": views}).rows(share).part("views")})


def logits(
    tower: VisionTower, head: nn.Module, images: Images, change=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines with the prototypes, of the pooled output and of every token, by the formulas."""
    features = tower(*images, change=change)

    def project(rows: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(head.fc2(functional.gelu(head.fc1(rows))))
        bottleneck = head.fc3(hidden)
        unit = bottleneck / bottleneck.square().sum(-1, keepdim=True).sqrt()
        prototypes = head.prototypes / head.prototypes.square().sum(-1, keepdim=True).sqrt()
        return unit @ prototypes.T

    return project(features.pooled), project(features.tokens)


def cross_entropy(teacher: torch.Tensor, centre: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return -(((teacher - centre) / 0.04).softmax(-1).detach() * (student / 0.1).log_softmax(-1)).sum(-1)


def test_a_shared_head_is_one_module_and_gets_the_gradients_of_both_losses() -> None:
    apart, given = training_model(), batch(0)
    torch.manual_seed(0)
    objectives = {
        "sigmoid": SigmoidLoss(),
        "distillation": SelfDistillation(weight=0.5, **HEAD),
        "masked": MaskedPrediction(weight=0.25, head_of="distillation", **HEAD),
    }
    shared = TrainingModel(Siglip(whole.CONFIG), objectives, ema=EMA)
    names = [name for name in shared.state_dict() if ".head." in name or "/head." in name]
    assert not any(name.startswith(("objectives.masked.", "teacher.copies.masked")) for name in names)
    shared.load_state_dict(
        {name: tensor for name, tensor in apart.state_dict().items() if name in shared.state_dict()}
    )
    for mine, theirs in (
        (apart.objectives["masked"].head, apart.objectives["distillation"].head),
        (apart.teacher.copies["masked/head"], apart.teacher.copies["distillation/head"]),
    ):
        mine.load_state_dict(theirs.state_dict())
    one, two = apart(given), shared(given)
    torch.testing.assert_close(two.total, one.total)
    one.total.backward()
    two.total.backward()
    both = zip(
        *(apart.objectives[name].head.parameters() for name in ("distillation", "masked")), strict=True
    )
    for found, parts in zip(shared.objectives["distillation"].head.parameters(), both, strict=True):
        torch.testing.assert_close(found.grad, parts[0].grad + parts[1].grad)
    for wrong, said in (
        ("nobody", "has no objective of that name"),
        ("sigmoid", "has no objective of that name"),
    ):
        with pytest.raises(UserError, match=said):
            TrainingModel(
                Siglip(whole.CONFIG), {"sigmoid": SigmoidLoss(), "m": MaskedPrediction(head_of=wrong, **HEAD)}
            )
    fewer = {**HEAD, "prototypes": 5}
    with pytest.raises(UserError, match="that head has 11 prototypes, and this objective 5"):
        TrainingModel(
            Siglip(whole.CONFIG), {"d": SelfDistillation(**HEAD), "m": MaskedPrediction(head_of="d", **fewer)}
        )


def test_both_losses_are_their_formulas_forward_and_in_every_gradient() -> None:
    model, given = training_model().double(), batch(0)
    distillation, masked = model.objectives["distillation"], model.objectives["masked"]
    nn.init.normal_(masked.mask_token.token)
    for objective in (distillation, masked):
        nn.init.normal_(objective.centre, std=0.1)
    divisors = {name: torch.tensor(count) for name, count in model.counts(given).items()}
    names = ["distillation", "masked"]
    losses = model(given, divisors, lambda own, passes: own.losses(passes, divisors, names))
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(losses.total, [*parameters.values()], allow_unused=True)

    views, tower, copies = given.part("views"), model.model.vision, model.teacher.copies
    teacher, _ = logits(copies["vision"], copies["distillation/head"], views.whole)
    rows = []
    for view in range(LOCAL):
        local = Images(views.local.patches[:, view], views.local.grid[:, view])
        student, _ = logits(tower, distillation.head, local)
        rows.append(cross_entropy(teacher, distillation.centre, student))
    by_image = torch.stack(rows).mean(0)

    def replaced(embedded: torch.Tensor) -> torch.Tensor:
        embedded = embedded.clone()
        for image, places in enumerate(views.masked):
            embedded[image, places] = masked.mask_token.token
        return embedded

    _, teacher = logits(copies["vision"], copies["masked/head"], views.whole)
    _, student = logits(tower, masked.head, views.whole, replaced)
    by_patch = cross_entropy(teacher, masked.centre, student)
    of_masked = torch.stack(
        [patches[places].mean() for patches, places in zip(by_patch, views.masked, strict=True)]
    )
    expected = 0.5 * by_image.mean() + 0.25 * of_masked.mean()
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    assert losses.terms["masked"].item() == pytest.approx(of_masked.mean().item(), rel=1e-12)
    gradients = torch.autograd.grad(expected, [*parameters.values()], allow_unused=True)
    for name, mine, theirs in zip(parameters, found, gradients, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13, msg=name)


def test_the_loss_can_count_every_patch() -> None:
    model = TrainingModel(
        Siglip(whole.CONFIG), {"masked": MaskedPrediction(tokens="all", **HEAD)}, ema=EMA
    ).double()
    given, masked, copies = batch(0), model.objectives["masked"], model.teacher.copies
    views = given.part("views")
    unseen = torch.zeros(len(views.masked), 4, dtype=torch.bool).scatter_(1, views.masked, value=True)
    _, teacher = logits(copies["vision"], copies["masked/head"], views.whole)
    _, student = logits(
        model.model.vision, masked.head, views.whole, lambda embedded: masked.mask_token(embedded, unseen)
    )
    expected = cross_entropy(teacher, masked.centre, student).mean()
    torch.testing.assert_close(model(given).total, expected, rtol=1e-12, atol=0)


def test_teacher_and_centre_follow_as_by_hand_over_ten_steps() -> None:
    model = training_model().double()
    copies, head = model.teacher.copies, model.objectives["distillation"].head
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    weight = copies["vision"].patch_embedding.weight.clone()
    prototypes, centre = copies["distillation/head"].prototypes.clone(), torch.zeros(11, dtype=torch.float64)
    for step in range(10):
        given = batch(step)
        with torch.no_grad():
            theirs, _ = logits(copies["vision"], copies["distillation/head"], given.part("views").whole)
        model(given).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        weight = 0.75 * weight + 0.25 * model.model.vision.patch_embedding.weight
        prototypes = 0.75 * prototypes + 0.25 * head.prototypes
        centre = 0.9 * centre + 0.1 * theirs.mean(0)
    torch.testing.assert_close(
        copies["vision"].patch_embedding.weight, weight.detach(), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(
        copies["distillation/head"].prototypes, prototypes.detach(), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(model.objectives["distillation"].centre, centre, rtol=1e-12, atol=1e-14)


def test_a_pass_that_both_ask_for_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = training_model(), {}

    def counting(name: str, tower: nn.Module) -> None:
        tower.register_forward_hook(lambda *_: calls.update({name: calls.get(name, 0) + 1}))

    counting("student", model.model.vision)
    counting("teacher", model.teacher.copies["vision"])
    model(batch(0))
    # the image, the local views together, the masked view; the teacher's global view for both
    assert calls == {"student": 3, "teacher": 1}


def test_views_that_leave_nothing_to_learn_are_refused() -> None:
    model, given = training_model(), batch(0)
    views = given.part("views")
    without = views._replace(local=Images(views.local.patches[:, :0], views.local.grid[:, :0]))
    none_masked = views._replace(masked=views.masked[:, :0])
    for nothing, message in ((without, "data.views.local=0"), (none_masked, "data.views.masked")):
        with pytest.raises(UserError, match=message):
            model(Batch({**given.parts, "views": nothing}))


def test_the_teacher_may_have_heads_alone() -> None:
    model = training_model(EmaConfig(momentum=0.75, scope="head"))
    assert set(model.teacher.copies) == {"distillation/head", "masked/head"}
    with_tower = training_model()
    assert sum(each.numel() for each in model.teacher.parameters()) < 0.5 * sum(
        each.numel() for each in with_tower.teacher.parameters()
    )
    forward_pass = ForwardPass(model.model, batch(0), model._copies())
    own = model.model.vision(*batch(0).part("views").whole)
    assert torch.equal(forward_pass.teacher.pooled, own.pooled)
    assert not forward_pass.teacher.pooled.requires_grad


def test_the_usual_momentum_goes_by_the_batch() -> None:
    known = {64: 0.999, 1024: 0.999, 4096: 0.99, 16384: 0.966, 32768: 0.966}
    assert {size: usual_momentum(size) for size in known} == pytest.approx(known)
    assert usual_momentum(2048) == pytest.approx(1 - (0.001 * 0.01) ** 0.5)


def taken(engine, take_step, micro_batch_size: int, first: int, end: int) -> list[list[float]]:
    """Of each step: global losses, total and terms, and the sums of the centres.

    After it the teacher is the moving average of what rank 0 gathers of the student.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    run, told = trainer(engine, micro_batch_size), []
    before = engine_state.gather_weights(engine)
    for step in range(first, end):
        report, _ = take_step(run, batch(step, rank, world_size), step + 1)
        values = torch.stack([report.total, *report.terms.values()])
        dist.all_reduce(values)
        own = engine.module.objectives
        centres = [own[name].centre.abs().sum().item() for name in ("distillation", "masked")]
        told.append([*(values / world_size).tolist(), *centres])
        weights = engine_state.gather_weights(engine)
        for name in (name for name in weights if name.startswith("teacher.")):
            of_student = name.replace("teacher.copies.vision.", "model.vision.")
            of_student = re.sub(r"teacher\.copies\.(\w+)/", r"objectives.\1.", of_student)
            assert of_student != name
            expected = 0.75 * before[name] + 0.25 * weights[of_student]
            torch.testing.assert_close(weights[name], expected, rtol=1e-6, atol=1e-7, msg=name)
        before = weights
    return told


def on_a_rank(cells: list[tuple[int, int]], folder: Path) -> list[list[list[float]]]:
    return through_a_resume(cells, folder, training_model, taken)


def in_one_process() -> list[list[float]]:
    model = training_model()
    optimizer, told = build_optimizer(model, whole.OPTIM), []
    trained = [each for each in model.parameters() if each.requires_grad]
    for step in range(STEPS):
        losses = model(batch(step))
        losses.total.backward()
        nn.utils.clip_grad_norm_(trained, whole.OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        centres = [model.objectives[name].centre.abs().sum().item() for name in ("distillation", "masked")]
        told.append([losses.total.item(), *(term.item() for term in losses.terms.values()), *centres])
    return told


def check(world_size: int, cells: list[tuple[int, int]], folder: Path) -> None:
    expected = torch.tensor(in_one_process())
    for by_cell in run_ranks(world_size, on_a_rank, cells, folder):
        for told in by_cell:
            torch.testing.assert_close(torch.tensor(told), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_two_ranks_at_stage_3_with_the_gradient_cache_and_a_resume_equal_one_process(tmp_path: Path) -> None:
    check(2, [(3, 3)], tmp_path)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_stage_with_and_without_the_gradient_cache_equals_one_process(
    world_size: int, tmp_path: Path
) -> None:
    size = whole.GLOBAL_BATCH // world_size // 3
    cells = [(0, size), (1, 0), (2, size), (3, 0)] if world_size == 2 else [(1, size), (3, 0)]
    check(world_size, cells, tmp_path)
