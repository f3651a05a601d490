"""What a run takes from another, what it says of it, and mistakes answered in one line."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from siglip_train import engine_state
from siglip_train.checkpoints.carry_over import PARTS, Lengths, Start, outlook, start_from
from siglip_train.checkpoints.load import read_moments
from siglip_train.checkpoints.save import CheckpointConfig, Checkpoints
from siglip_train.checkpoints.write import Progress
from siglip_train.errors import UserError
from siglip_train.interop.native import Description, write_export
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.base import Objective
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.optim import OptimConfig, ParameterRule, schedule
from siglip_train.parameter_groups import build_optimizer
from tests.conftest import ROOT
from tests.engine.test_engine import CONFIG
from tests.test_train import mistake


class Scored(Objective):
    """With a head, and a state that is not trained."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(4, classes)
        self.register_buffer("centre", torch.zeros(4))


def model_with(**objectives: int) -> TrainingModel:
    return TrainingModel(Siglip(CONFIG), {name: Scored(classes) for name, classes in objectives.items()})


def moments_of(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        found.update(
            {f"{name}.{key}": torch.full_like(parameter, number + 1) for key in engine_state.MOMENTS}
        )
        found[f"{name}.step"] = torch.tensor(step)
    return found


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingModel]:
    """A run with the objectives `kept` and `old` after ten steps of 24 pairs, and its model."""
    model = model_with(kept=3, old=3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    run_dir = tmp_path_factory.mktemp("before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_state, "gather_weights", lambda _: model.state_dict())
        patch.setattr(engine_state, "gather_moments", lambda _: moments_of(model, 10))
        saver = Checkpoints(
            run_dir, CheckpointConfig(), lambda path, state: write_export(path, state, Description(CONFIG))
        )
        engine = type("Engine", (), {"global_rank": 0})
        saver.save(engine, Progress(10, 240, {"samples_seen": 240}, pretrained=("model.logit_bias",)))
    return run_dir, model


def start(
    model: TrainingModel, source: Path, parts: tuple[str, ...] = PARTS, batch: int = 24, total: int = 480,
    **options,
) -> Start:  # fmt: skip
    return start_from(str(source), model, parts=parts, lengths=Lengths(batch, total), **options)


def test_what_is_taken_new_and_dropped_is_said_by_name(
    before: tuple[Path, TrainingModel], caplog: pytest.LogCaptureFixture
) -> None:
    source, theirs = before
    caplog.set_level(logging.INFO)
    model = model_with(kept=3, new=3)
    begun = start(model, source)
    own, there = model.state_dict(), theirs.state_dict()
    shared = [name for name in own if not name.startswith("objectives.new")]
    assert all(torch.equal(own[name], there[name]) for name in shared)
    assert (begun.progress.step, begun.progress.samples_seen) == (10, 240)
    assert begun.progress.loader == {"samples_seen": 240}
    assert begun.progress.pretrained == ("model.logit_bias",), "the recipe's start decides what is pretrained"
    checkpoint = source / "checkpoints/step-00000010"
    assert (
        f"carry_over from {checkpoint}: 3 tensors of heads and objectives loaded; 3 start from initial values: "
        "objectives.new.centre, "
        "objectives.new.head.bias, objectives.new.head.weight; 3 dropped: objectives.old.centre, "
        "objectives.old.head.bias, objectives.old.head.weight" in caplog.text
    )
    assert f"position from {checkpoint}: 240 samples seen, step 10" in caplog.text
    towers = len(list(model.model.parameters()))
    build_optimizer(model, OptimConfig(rules=[ParameterRule("logit_bias", frozen=True)]))
    assert outlook(model, begun) == (
        f"AdamW: {towers + 1} parameters continue with their moments, after 10 updates; 2 at step 0 in groups "
        "of their own: objectives.new.head.bias, objectives.new.head.weight; 3 whose moments are dropped: "
        "model.logit_bias, objectives.old.head.bias, objectives.old.head.weight"
    )


class Shares(Scored):
    """A head that may be one of the text tower's layers."""

    def __init__(self, *, is_shared: bool) -> None:
        super().__init__()
        self.is_shared = is_shared
        self.table = nn.Parameter(torch.zeros(2))

    def share_with(self, model: Siglip) -> None:
        if self.is_shared:
            self.table = model.text.head.weight


def test_what_an_objective_shares_with_the_towers_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for was_shared in (True, False):
        before = TrainingModel(Siglip(CONFIG), {"decoder": Shares(is_shared=was_shared)})
        weights = {name: parameter.detach().normal_() for name, parameter in before.named_parameters()}
        weights["objectives.decoder.centre"] = torch.ones(4)
        monkeypatch.setattr(engine_state, "gather_weights", lambda _, weights=weights: weights)
        monkeypatch.setattr(engine_state, "gather_moments", lambda _, model=before: moments_of(model, 10))
        run_dir = tmp_path / f"{was_shared}"
        saver = Checkpoints(
            run_dir, CheckpointConfig(), lambda path, state: write_export(path, state, Description(CONFIG))
        )
        saver.save(type("Engine", (), {"global_rank": 0}), Progress(10, 240, {"samples_seen": 240}))
        model = TrainingModel(Siglip(CONFIG), {"decoder": Shares(is_shared=True)})
        caplog.clear()
        start(model, run_dir)
        line = next(record.message for record in caplog.records if "heads and objectives" in record.message)
        assert "3 tensors of heads and objectives loaded" in line
        assert "initial values" not in line, "the shared table was called fresh"
        # one of its own, of the source, is not put over the tower's
        assert ("1 dropped: objectives.decoder.table" in line) == (not was_shared)
        assert torch.equal(model.model.text.head.weight, weights["model.text.head.weight"])


def test_only_what_is_asked_for_is_taken(before: tuple[Path, TrainingModel]) -> None:
    source, theirs = before
    there = theirs.state_dict()
    head, centre = "objectives.kept.head.weight", "objectives.kept.centre"
    for parts, has_head, has_centre in (
        (("model",), False, False),
        (("model", "heads"), True, False),
        (("model", "objectives", "optimizer"), False, True),
    ):
        model = model_with(kept=3)
        begun = start(model, source, parts)
        own = model.state_dict()
        assert torch.equal(own["model.text.head.weight"], there["model.text.head.weight"])
        assert torch.equal(own[head], there[head]) == has_head
        assert torch.equal(own[centre], there[centre]) == has_centre
        # from the beginning of the data and of the schedule, and with what was loaded as pretrained
        assert begun.progress == Progress(pretrained=begun.progress.pretrained)
        assert len(begun.progress.pretrained) == len(list(model.model.parameters()))
        taken = engine_state.steps_of(begun.moments)
        assert len(taken) == (len(begun.progress.pretrained) if "optimizer" in parts else 0)
        assert f"{head}.exp_avg" not in begun.moments, (
            "a head with initial values must not get moments of another"
        )


def test_a_parameter_in_a_group_has_as_many_updates_as_the_others(before: tuple[Path, TrainingModel]) -> None:
    model = model_with(kept=3, new=3)
    steps = engine_state.steps_of(start(model, before[0]).moments)
    groups = build_optimizer(model, OptimConfig(), steps=steps).param_groups
    counts = [{steps.get(name, 0) for name in group["names"]} for group in groups]
    assert sorted(map(list, counts)) == [[0], [0], [10], [10]], "decayed and not, old and new"
    assert len(build_optimizer(model, OptimConfig()).param_groups) == 2


def test_a_checkpoint_of_an_earlier_version_knows_one_count_for_all(
    before: tuple[Path, TrainingModel], tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(before[0] / "checkpoints/step-00000010", tmp_path / "step-00000010")
    file = checkpoint / "moments.safetensors"
    moments = load_file(file)
    save_file({name: tensor for name, tensor in moments.items() if not name.endswith(".step")}, file)
    found = read_moments(checkpoint)
    assert found.keys() == moments.keys()
    assert set(engine_state.steps_of(found).values()) == {10}


def test_another_shape_is_told_with_the_way_out(before: tuple[Path, TrainingModel]) -> None:
    source, _ = before
    with pytest.raises(
        UserError, match=r"objectives.kept.head.weight is \[3, 4\] in .* and \[5, 4\] here; to let"
    ) as told:
        start(model_with(kept=5), source)
    assert "init_skip=[objectives.kept.head.weight]" in str(told.value)
    begun = start(model_with(kept=5), source, skip=["objectives.kept.head"])
    assert "objectives.kept.head.weight" in begun.dropped
    with pytest.raises(UserError, match=r"init_skip: nothing begins with 'objectives.nothing'"):
        start(model_with(kept=3), source, skip=["objectives.nothing"])


def test_a_position_that_does_not_fit_is_told(before: tuple[Path, TrainingModel]) -> None:
    source, _ = before
    assert start(model_with(kept=3), source, batch=48).progress.step == 5, (
        "steps are those of this run's batch"
    )
    with pytest.raises(
        UserError, match="the position is 240 samples, which global_batch_size=50 does not divide"
    ):
        start(model_with(kept=3), source, batch=50)
    with pytest.raises(UserError, match=r"total_samples=240: .* has seen 240 already; set a larger one"):
        start(model_with(kept=3), source, total=240)


def test_a_start_without_the_rest_of_a_run_is_told(
    before: tuple[Path, TrainingModel], tmp_path: Path
) -> None:
    write_export(tmp_path / "export", before[1].model.state_dict(), Description(CONFIG))
    with pytest.raises(UserError, match="is a model without the rest of a run, so it has none of optimizer"):
        start(model_with(kept=3), tmp_path / "export", ("model", "optimizer"))
    assert start(model_with(kept=3), tmp_path / "export", ("model",)).moments == {}


def test_a_damaged_start_is_told(before: tuple[Path, TrainingModel], tmp_path: Path) -> None:
    damaged = shutil.copytree(before[0], tmp_path / "run")
    file = damaged / "checkpoints/step-00000010/state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "samples_seen": 264}, indent=1))
    with pytest.raises(UserError, match=r"init_from: the checkpoint .* is damaged: state.json"):
        start(model_with(kept=3), damaged)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            "[model,optimiser]",
            "carry_over[1]: 'optimiser' is not one of 'model', 'heads', 'objectives', 'optimizer', 'position'",
        ),
        ("[optimizer]", "carry_over: [optimizer] leaves out the model"),
        (
            "[model,position]",
            "carry_over: position without optimizer would restart AdamW with zero moments after its warm-up",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    parts: str,
    expected: str,
    before: tuple[Path, TrainingModel],
    small_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(ROOT)
    assert expected in mistake(
        [*small_run, f"init_from={before[0]}", f"carry_over={parts}"], monkeypatch, capsys
    )


def test_stages_share_the_curve_of_the_whole_schedule() -> None:
    whole = OptimConfig(warmup_share=0.1)
    stage = OptimConfig(warmup_share=0.1, schedule_samples=1000)
    for seen in range(0, 400, 10):
        expected = schedule(whole, samples_seen=seen, batch=10, total_samples=1000)
        assert schedule(stage, samples_seen=seen, batch=10, total_samples=400) == expected
