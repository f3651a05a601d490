"""Recipes: a model is what `model=` names, and what the papers say of a training stands in its experiment."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from siglip_train.composition import instantiate_all
from siglip_train.config import Config, parse
from siglip_train.errors import UserError
from siglip_train.interop.runs import checkpoint_name
from siglip_train.models.flops import flops_per_pair
from siglip_train.models.published import likeness
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.base import StepSizes
from siglip_train.objectives.training_model import TrainingModel
from siglip_train.parameter_groups import parameter_groups
from siglip_train.typed import REQUIRED, build
from tests.composing import composed, filled, names, sizes
from tests.conftest import ROOT
from tests.models.test_sizes import millions

EXPERIMENTS = names("experiment")
FILES = sorted((ROOT / "conf" / "experiment").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_may_only_choose_a_model(path: Path) -> None:
    """A body would lie over the `model=` of a command line, and train another model than it names."""
    assert "model" not in (yaml.safe_load(path.read_text()) or {}), "sizes belong into a file of conf/model"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_model_of_the_command_line_wins(experiment: str) -> None:
    """All of conf/model with all experiments: tests/models/test_sizes.py."""
    for model in ("b16", "tiny"):
        assert sizes(f"experiment={experiment}", f"model={model}") == sizes(f"model={model}")


class Recipe(NamedTuple):
    """What the papers say of an experiment: its model and million parameters, its batches, its optimizer, its texts."""

    title: str
    parameters: float
    batch: int = 32768
    samples: float = 40e9
    lr: float = 1e-3
    decay: float = 0.1
    warmup: float = 20_000 * 32768
    length: int = 64
    vocabulary: int = 32000
    objectives: tuple[str, ...] = ("sigmoid",)
    # samples that an earlier stage has seen
    begins: float = 0.0


def stage(title: str, parameters: float) -> Recipe:
    return Recipe(title, parameters, samples=5e9, lr=1e-5, decay=0.0, warmup=5e7)


def siglip2(title: str, parameters: float) -> Recipe:
    return Recipe(f"SigLIP 2 {title}, 256 px", parameters, vocabulary=256000)


def first_stage(title: str, parameters: float) -> Recipe:
    """With the decoder, to 80 % of the schedule."""
    return siglip2(title, parameters)._replace(samples=32e9, objectives=("sigmoid", "captioning"))


def second_stage(title: str, parameters: float) -> Recipe:
    """With the self-supervised losses too, from there to the end."""
    objectives = ("sigmoid", "captioning", "self_distillation", "masked_prediction")
    return siglip2(title, parameters)._replace(begins=32e9, objectives=objectives)


def third_stage(title: str, parameters: float) -> Recipe:
    """The second from 95 % on, at another resolution."""
    return second_stage(title, parameters)._replace(title=f"SigLIP 2 {title}", begins=38_000_001_024)


RECIPES = {
    "siglip_b16_224": stage("SigLIP B/16, 224 px", 203.16),
    "siglip_b16_256": Recipe("SigLIP B/16, 256 px", 203.20),
    "siglip_b16_384": stage("SigLIP B/16, 384 px", 203.45),
    "siglip_b16_512": stage("SigLIP B/16, 512 px", 203.79),
    "siglip_l16_256": Recipe("SigLIP L/16, 256 px", 652.15),
    "siglip_l16_384": stage("SigLIP L/16, 384 px", 652.48),
    "siglip_so400m14_224": Recipe("SigLIP So400m/14, 224 px", 877.36, length=16),
    "siglip_so400m14_384": stage("SigLIP So400m/14, 384 px", 877.96),
    "msiglip_b16": Recipe("mSigLIP B/16, 256 px", 370.63, vocabulary=250000),
    "siglit_b8": Recipe("SigLiT B/8, 224 px", 270.54, samples=65_000 * 32768, warmup=6500 * 32768, length=16),
    "siglit_g14": Recipe(
        "SigLiT g/14, 288 px", 1373.19, 20480, samples=107_000 * 20480, warmup=10_700 * 20480, length=16
    ),
    "siglit_any": Recipe("SigLIP B/16, 256 px", 203.20, samples=65_000 * 32768, warmup=6500 * 32768),
    "siglip2_b32_sigmoid": siglip2("B/32", 376.86),
    "siglip2_b16_sigmoid": siglip2("B/16", 375.23),
    "siglip2_l16_sigmoid": siglip2("L/16", 881.53),
    "siglip2_so400m16_sigmoid": siglip2("So400m/16", 1135.67),
    "siglip2_g16_sigmoid": siglip2("g-opt/16", 1871.39),
    "siglip2_b32_a_base": first_stage("B/32", 376.86),
    "siglip2_b16_a_base": first_stage("B/16", 375.23),
    "siglip2_l16_a_base": first_stage("L/16", 881.53),
    "siglip2_so400m16_a_base": first_stage("So400m/16", 1135.67),
    "siglip2_g16_a_base": first_stage("g-opt/16", 1871.39),
    "siglip2_b32_b_selfdistill": second_stage("B/32", 376.86),
    "siglip2_b16_b_selfdistill": second_stage("B/16", 375.23),
    "siglip2_l16_b_selfdistill": second_stage("L/16", 881.53),
    "siglip2_so400m16_b_selfdistill": second_stage("So400m/16", 1135.67),
    "siglip2_g16_b_selfdistill": second_stage("g-opt/16", 1871.39),
    "siglip2_b16_c_224": third_stage("B/16, 224 px", 375.19),
    "siglip2_b16_c_384": third_stage("B/16, 384 px", 375.48),
    "siglip2_b16_c_512": third_stage("B/16, 512 px", 375.82),
    "siglip2_l16_c_384": third_stage("L/16, 384 px", 881.85),
    "siglip2_l16_c_512": third_stage("L/16, 512 px", 882.31),
    "siglip2_so400m14_c_224": third_stage("So400m/14, 224 px", 1135.46),
    "siglip2_so400m14_c_384": third_stage("So400m/14, 384 px", 1136.01),
    "siglip2_so400m16_c_384": third_stage("So400m/16, 384 px", 1136.04),
    "siglip2_so400m16_c_512": third_stage("So400m/16, 512 px", 1136.56),
    "siglip2_g16_c_384": third_stage("g-opt/16, 384 px", 1871.89),
}  # fmt: skip


# by size, the factor of both self-supervised losses (SigLIP 2, section 2.3)
FACTORS = {"b32": 0.25, "b16": 0.25, "l16": 0.5, "so400m16": 1.0, "g16": 0.5}


@pytest.mark.parametrize("size", FACTORS)
def test_the_second_stage_goes_on_from_the_first_with_the_weights_of_the_paper(size: str) -> None:
    config = build(Config, written(f"siglip2_{size}_b_selfdistill"))
    weights = {name: node["weight"] for name, node in config.objectives.items()}
    assert weights == {
        "sigmoid": 1.0,
        "captioning": 1.0,
        "self_distillation": FACTORS[size],
        "masked_prediction": FACTORS[size] / 4,
    }
    assert composed(f"experiment=siglip2_{size}_b_selfdistill")["init_from"] == f"runs/siglip2_{size}_a_base"
    assert set(config.carry_over) == {"model", "heads", "objectives", "optimizer", "position"}
    views, patch = config.data.views, config.model.vision.patch_size
    assert (views.local, views.local_patches * patch, views.masked) == (8, 96, 0.5)
    kept = [samples / config.total_samples for samples in config.checkpoint.keep_at_samples]
    assert kept == pytest.approx([0.9, 0.95], abs=1e-6)


@pytest.mark.parametrize("name", [name for name in RECIPES if "_c_" in name])
def test_the_third_stage_is_the_second_from_95_percent_on_at_another_resolution(name: str) -> None:
    size, pixels = name.removeprefix("siglip2_").split("_c_")
    parent = f"siglip2_{size.replace('m14', 'm16')}_b_selfdistill"
    second, third = composed(f"experiment={parent}"), composed(f"experiment={name}")
    vision = filled(f"experiment={name}")["model"]["vision"]
    assert (vision["image_size"], vision["patch_size"]) == (int(pixels), 14 if "m14" in size else 16)
    # local views stay as large as they were, as nearly as patches allow
    assert abs(third["data"]["views"]["local_patches"] * vision["patch_size"] - 96) <= 2
    step = second["checkpoint"]["keep_at_samples"][1] // second["global_batch_size"]
    assert third["init_from"] == f"runs/{parent}/checkpoints/{checkpoint_name(step)}"
    for key in ("model", "init_from", "data"):
        del second[key], third[key]
    assert third == second, "nothing else"


def test_the_chains_have_every_fixed_resolution_that_was_released() -> None:
    found = {
        yaml.safe_load((ROOT / "conf/recipe" / f"{name}.yaml").read_text())["stages"][stage]["experiment"]
        for name in names("recipe")
        if name != "siglip2_tiny"
        for stage in yaml.safe_load((ROOT / "conf/recipe" / f"{name}.yaml").read_text())["stages"]
    }
    assert found == {name for name in RECIPES if re.search("siglip2_.*_(a|b|c)_", name)}


def written(name: str) -> dict[str, Any]:
    """What the experiment composes to, with the two things that it asks its user for."""
    values = filled(f"experiment={name}")
    assert values["tokenizer"] == REQUIRED
    assert values["data"]["sources"] == {}, "a recipe names no data"
    return {**values, "tokenizer": "any"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_settings_of_its_paper(name: str) -> None:
    recipe, config = RECIPES[name], build(Config, written(name))
    assert likeness(config.model) == (recipe.title, "as published")
    with torch.device("meta"):
        model = Siglip(config.model)
    assert millions(model) == recipe.parameters
    assert (config.model.text.context_length, config.model.text.vocab_size) == (
        recipe.length,
        recipe.vocabulary,
    )
    optim = config.optim
    assert (config.global_batch_size, config.total_samples) == (recipe.batch, recipe.samples)
    assert (optim.lr, optim.weight_decay, optim.warmup(config.total_samples)) == (
        recipe.lr,
        recipe.decay,
        recipe.warmup,
    )
    assert (optim.betas, optim.clip_norm, optim.schedule) == ((0.9, 0.95), 1.0, "cosine")
    assert tuple(config.objectives) == recipe.objectives
    rules = (config.text_rules.lowercase, config.text_rules.strip_punctuation, config.text_rules.pad)
    assert rules == ((True, False, "pad") if name.startswith("siglip2") else (True, True, "eos"))
    # big_vision decays what flax calls a kernel: matrices of linear layers and of the stem
    trained = TrainingModel(model, {})
    decayed = {
        n for group in parameter_groups(trained, optim) if group["weight_decay"] for n in group["names"]
    }
    linear = {f"{n}.weight" for n, module in trained.named_modules() if isinstance(module, torch.nn.Linear)}
    if name.startswith("siglit"):
        linear = {n for n in linear if n.startswith("model.text.")}
    assert decayed == (linear if recipe.decay else set())


def test_every_recipe_is_in_the_table_and_none_is_left_out() -> None:
    on_paper = re.compile(r"^  - (base/|siglip2_(?!tiny)\w+_b_selfdistill$)", re.MULTILINE)
    recipes = {path.stem for path in FILES if on_paper.search(path.read_text())}
    assert recipes == set(RECIPES)
    readme = (ROOT / "conf" / "README.md").read_text()
    for name in EXPERIMENTS:
        assert f"`{name}`" in readme, "every experiment has a row in conf/README.md"


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_head_of_a_recipe_estimates_follows_from_its_flops(name: str) -> None:
    """Hours: pairs * FLOPs of a pair / (GPUs * 989e12 * MFU), 989 TFLOP/s being an H100's in bf16 without sparsity."""
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().replace("\n#", "")
    estimate = re.search(
        r"Estimate, not measured: ([\d,]+) hours on (\d+) H100 at (\d+) % MFU"
        r".*? ([\d.]+) billion pairs of ([\d.]+) TFLOP",
        text,
    )
    assert estimate is not None
    hours, gpus, mfu, pairs, flops = (float(number.replace(",", "")) for number in estimate.groups())
    config = build(Config, written(name))
    locked = name.startswith("siglit")
    with torch.device("meta"):
        model = TrainingModel(Siglip(config.model), instantiate_all(config.objectives, "objectives"))
    work = flops_per_pair(config.model, vision_passes=1.0 if locked else 3.0)
    work += model.flops_per_sample(StepSizes(config.model, config.data.views))
    trained = config.total_samples - RECIPES[name].begins
    assert flops == pytest.approx(work / 1e12, abs=6e-4)
    assert pairs == pytest.approx(trained / 1e9, rel=2e-3)
    assert hours == pytest.approx(trained * work / (gpus * 989e12 * mfu / 100) / 3600, abs=0.6)


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_of_a_recipe_names_its_model_and_an_expected_result(name: str) -> None:
    head = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().split("\ndefaults:")[0]
    family, size = RECIPES[name].title.split(",")[0].rsplit(" ", 1)
    # whose tower is of another kind than what is trained to it
    family = "SigLiT" if name == "siglit_any" else family
    assert re.match(rf"# @package _global_\n# {family} .*{size}\b.* ", head)
    assert re.search(r" (Released model|Published model|Paper)\b.*?[\d.]+( %| mIoU)", head.replace("\n#", ""))


ASKED = {
    "siglip2_b16_sigmoid": [
        r"tokenizer: .*Gemma's.*tokenizer=PATH/tokenizer.model",
        r"data\.sources: .*shards=",
    ],
    "siglip_b16_256": [r"tokenizer: .*32,000.*tokenizer=PATH/spiece.model", r"data\.sources: .*shards="],
    "msiglip_b16": [r"tokenizer: .*250,000.*tokenizer=", r"data\.sources: .*shards="],
    "siglit_b8": [r"init_from: .*init_from=", r"tokenizer: .*tokenizer=", r"data\.sources: .*shards="],
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_recipe_cannot_know_is_asked_for_at_once_a_line_each(name: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(filled(f"experiment={name}"))
    lines = str(raised.value).splitlines()
    assert len(lines) == len(ASKED[name])
    for line, pattern in zip(lines, ASKED[name], strict=True):
        assert re.match(pattern, line)


@pytest.mark.parametrize(
    ("name", "depth", "parameters"), [("b16", 6, 450.0), ("so400m16", 14, 877.7), ("g16", 14, 879.4)]
)
def test_a_decoder_has_half_the_layers_of_the_text_tower_rounded_up(
    name: str, depth: int, parameters: float
) -> None:
    config = build(Config, written(f"siglip2_{name}_a_base"))
    with torch.device("meta"):
        objective = instantiate_all(config.objectives, "objectives")["captioning"]
    assert len(objective.decoder.blocks) == depth
    assert round(sum(each.numel() for each in objective.parameters()) / 1e6, 1) == parameters


def test_a_scaled_use_is_one_override_of_batch_and_samples() -> None:
    scaled = filled("experiment=siglip2_b16_sigmoid", "global_batch_size=4096", "total_samples=4e8")
    config = build(Config, {**scaled, "tokenizer": "any"})
    assert (config.global_batch_size, config.total_samples) == (4096, 400_000_000)
    assert isinstance(config.total_samples, int)
    assert config.optim.warmup(config.total_samples) == 6_553_600
    assert config.optim.lr == 1e-3


def assumptions(path: Path) -> list[str]:
    """The keys that a comment with the word stands before, as `optim.eps`."""
    found, group, is_marked = [], "", False
    for line in path.read_text().splitlines():
        key = re.match(r"( *)(\w+):", line)
        if key and not line.lstrip().startswith("#"):
            group = key[2] if not key[1] else group
            if is_marked:
                found.append(f"{group}.{key[2]}" if key[1] else key[2])
            is_marked = False
        elif line.lstrip().startswith("#"):
            is_marked = is_marked or " assumption: " in f"{line} " or line.rstrip().endswith("# assumption")
    return found


def test_every_assumption_stands_in_the_table() -> None:
    readme = (ROOT / "conf" / "README.md").read_text()
    rows = readme[readme.index("## Assumptions") :]
    found = {
        key for path in (ROOT / "conf" / "experiment" / "base").glob("*.yaml") for key in assumptions(path)
    }
    assert {"optim.eps", "optim.betas", "optim.clip_norm", "optim.warmup_share", "text_rules"} <= found
    for key in found:
        assert f"`{key}`" in rows, key
