"""What a config leaves open is filled from the checkpoint; what the user set stays, and is told where it differs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from siglip_train.config import parse
from siglip_train.data.tokenizer import TextRules
from siglip_train.errors import UserError
from siglip_train.interop.native import Description, write_export
from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from siglip_train.settings.starting_point import fill
from siglip_train.typed import REQUIRED, build
from tests.composing import composed, sizes
from tests.models.small import small_model

RULES = TextRules(strip_punctuation=True, pad="eos")


@pytest.fixture
def start(tmp_path: Path, sentencepiece_model: Path) -> Path:
    """An export with settings that are nobody's defaults."""
    model = small_model()
    described = Description(model.config, tokenizer=sentencepiece_model, rules=RULES, resize="bicubic")
    write_export(tmp_path / "start", model.state_dict(), described)
    return tmp_path / "start"


def command(start: Path | None, *overrides: str) -> dict[str, Any]:
    """What `siglip-train init_from=START …` composes to."""
    return composed(
        *([f"init_from={start}"] if start else []), "++data.sources.mine.shards=mine.tar", *overrides
    )


def test_everything_open_is_as_the_checkpoint_has_it(start: Path) -> None:
    values, notes = fill(command(start, "total_samples=9", "global_batch_size=3"))
    config = parse(values)
    assert config.model == small_model().config
    assert config.text_rules == RULES
    assert config.data.resize == "bicubic"
    assert Path(str(config.tokenizer)).parent == start
    assert notes == [
        f"from {start}: image tower, text tower, text rules, bicubic resizing, tokenizer tokenizer.model"
    ]


def test_what_the_user_sets_wins_and_is_listed_in_a_line_each(start: Path, sentencepiece_model: Path) -> None:
    theirs = small_model().config.vision
    size = 2 * theirs.image_size
    overrides = [
        f"model.vision.image_size={size}",
        "text_rules.lowercase=false",
        f"tokenizer={sentencepiece_model}",
    ]
    values, notes = fill(command(start, *overrides))
    assert values["model"]["vision"]["image_size"] == size
    assert values["model"]["vision"]["patch_size"] == theirs.patch_size
    assert values["text_rules"] == {"lowercase": False, "strip_punctuation": True, "pad": "eos"}
    assert notes[1:] == [
        f"image_size {size} instead of {theirs.image_size}: positions resampled",
        f"tokenizer {sentencepiece_model} instead of {start / 'tokenizer.model'}",
    ]


def test_another_patch_size_is_listed_with_what_becomes_of_it(start: Path) -> None:
    (note,) = fill(command(start, "model.vision.patch_size=8")).notes[1:]
    assert note == "patch_size 8 instead of 4: stem and positions resampled"


def test_a_whole_model_of_the_command_line_wins_too(start: Path) -> None:
    values, _ = fill(command(start, "model=tiny"))
    assert build(SiglipConfig, values["model"], "model") == sizes("model=tiny")


def test_from_scratch_what_is_open_is_siglip_2_b16() -> None:
    values, notes = fill(command(None, "tokenizer=any"))
    assert build(SiglipConfig, values["model"], "model") == sizes("model=b16")
    assert build(TextRules, values["text_rules"], "text_rules") == TextRules()
    assert values["data"]["resize"] == "bilinear"
    assert notes == []
    values, _ = fill(command(None, "model.vision.depth=3"))
    assert (values["model"]["vision"]["depth"], values["model"]["text"]["depth"]) == (3, 12)


def test_values_are_filled_in_a_copy(start: Path) -> None:
    values = command(start)
    fill(values)
    assert values["model"]["vision"]["width"] is None


def test_a_missing_start_is_told_unless_the_run_goes_on_without_it(start: Path, tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path}/run", "total_samples=9", "global_batch_size=3"]
    values = command(tmp_path / "gone", *overrides)
    with pytest.raises(
        UserError, match=r"init_from: there is no .*gone; give a run or a folder of a trained"
    ):
        fill(values)
    # what the run was started from is gone, and its newest checkpoint there
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    start.rename(checkpoint / "weights")
    (checkpoint.parent / "LAST").write_text("step-00000003\n")
    (tmp_path / "run" / "config.yaml").write_text("tokenizer: gone/tokenizer.model\n")
    filled, notes = fill(values)
    config = parse(filled)
    assert config.model == small_model().config
    assert (config.text_rules, config.data.resize, notes) == (RULES, "bicubic", [])
    assert Path(str(config.tokenizer)) == checkpoint / "weights" / "tokenizer.model"
    # the run's own copy outlives the checkpoint, and its first place goes before both
    (tmp_path / "run" / "tokenizer").mkdir()
    kept = tmp_path / "run" / "tokenizer" / "tokenizer.model"
    kept.write_bytes((checkpoint / "weights" / "tokenizer.model").read_bytes())
    assert fill(values).values["tokenizer"] == str(kept)
    first = tmp_path / "first.model"
    kept.rename(first)
    (tmp_path / "run" / "config.yaml").write_text(f"tokenizer: {first}\n")
    assert fill(values).values["tokenizer"] == str(first)


def tower_folder(folder: Path) -> Path:
    """An image tower alone, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=4)
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    return folder


def test_an_image_tower_alone_is_a_start_whose_text_tower_begins_anew(
    tmp_path: Path, sentencepiece_model: Path
) -> None:
    folder = tower_folder(tmp_path / "tower")
    values, notes = fill(command(folder, f"tokenizer={sentencepiece_model}"))
    assert values["init_skip"] == ["text.", "logit_"]
    assert notes == [
        f"from {folder}: image tower, bicubic resizing",
        f"{folder} has none of text., logit_: these start from initial values",
    ]
    model = build(SiglipConfig, values["model"], "model")
    same = {"width": 24, "mlp_dim": 40, "depth": 2, "heads": 3}
    assert model == SiglipConfig(
        VisionConfig(image_size=16, patch_size=4, **same), TextConfig(vocab_size=30, **same)
    )


def test_without_captions_no_tokenizer_is_asked_for(tmp_path: Path) -> None:
    folder = tower_folder(tmp_path / "tower")
    assert fill(command(folder)).values["tokenizer"] == REQUIRED
    assert fill(command(folder, "++data.sources.mine.text=null")).values["tokenizer"] is None


def test_naflex_positions_stay_a_table_of_their_own(tmp_path: Path) -> None:
    model = small_model()
    model.config.vision.position_grid = 4
    write_export(tmp_path / "naflex", model.state_dict(), Description(model.config))
    config = tmp_path / "naflex" / "config.json"
    content = json.loads(config.read_text())
    content["model"]["vision"]["position_grid"] = 4
    config.write_text(json.dumps(content))
    side = model.config.vision.table_side
    assert side == 4, "the table of the small model"
    # written out or not, the usual table follows the images
    values, _ = fill(command(tmp_path / "naflex", "model.vision.image_size=32"))
    assert values["model"]["vision"]["position_grid"] is None
    content["model"]["vision"]["image_size"] = 32
    config.write_text(json.dumps(content))
    values, _ = fill(command(tmp_path / "naflex", "model.vision.image_size=64"))
    assert values["model"]["vision"]["position_grid"] == 4
    assert load_file(tmp_path / "naflex" / "model.safetensors")["vision.position_table"].shape[0] == 16


def test_sources_take_what_they_do_not_say_from_the_defaults() -> None:
    values, _ = fill(
        command(
            None,
            "++data.source_defaults={text: null, label: cls}",
            "++data.sources.other={shards: other.tar, label: 'json:class'}",
        )
    )
    sources = values["data"]["sources"]
    assert sources["mine"] == {"shards": "mine.tar", "text": None, "label": "cls"}
    assert sources["other"] == {"shards": "other.tar", "text": None, "label": "json:class"}


def test_a_head_is_as_wide_as_the_tower_and_the_rate_that_of_its_size(start: Path) -> None:
    values, _ = fill(command(start, "experiment=finetune_full"))
    width = small_model().config.vision.width
    assert values["objectives"]["classification"]["width"] == width
    assert values["optim"]["lr"] == 1e-3, "that of the narrowest in the table"
    for model, rate in (("s16", 3e-4), ("b16", 1.5e-4), ("l16", 1e-4), ("so400m14", 7e-5), ("g16", 5e-5)):
        values, _ = fill(command(None, "experiment=finetune_full", f"model={model}"))
        assert values["optim"]["lr"] == rate
    assert fill(command(start, "experiment=finetune_full", "optim.lr=1")).values["optim"]["lr"] == 1


@pytest.mark.parametrize("name", ["model", "data", "text_rules", "optim"])
def test_a_value_in_place_of_a_group_is_named(start: Path, name: str) -> None:
    values = command(start)
    values[name] = 5
    with pytest.raises(UserError, match=rf"{name}: expected a group of keys, got 5"):
        fill(values)
