"""What a run says it trains: the model of conf/model that it is, or the nearest and in what it differs."""

import dataclasses

import pytest

from siglip_train.models.published import likeness, of_file
from siglip_train.models.siglip import SiglipConfig
from siglip_train.models.text import TextConfig
from siglip_train.models.vision import VisionConfig
from tests.composing import names, sizes


# auto* leave their sizes to the model that a run starts from
@pytest.mark.parametrize("name", [name for name in names("model") if not name.startswith("auto")])
def test_every_file_has_a_title_and_is_read_as_hydra_reads_it(name: str) -> None:
    assert of_file(name) == sizes(f"model={name}")
    title, note = likeness(of_file(name))
    assert title.endswith(f", {of_file(name).vision.image_size} px")
    assert note in ("as published", f"as in conf/model/{name}.yaml")


def changed(name: str, **towers: dict) -> SiglipConfig:
    config = of_file(name)
    return SiglipConfig(
        dataclasses.replace(config.vision, **towers.get("vision", {})),
        dataclasses.replace(config.text, **towers.get("text", {})),
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (of_file("b16"), ("SigLIP 2 B/16, 256 px", "as published")),
        # NaFlex writes down the grid that is the usual one
        (changed("b16", vision={"position_grid": 16}), ("SigLIP 2 B/16, 256 px", "as published")),
        (
            changed("b16", text={"depth": 1}),
            ("SigLIP 2 B/16, 256 px", "differs from b16 in text.depth (1 instead of 12)"),
        ),
        (
            changed("b16", vision={"image_size": 320}),
            ("SigLIP 2 B/16, 320 px", "differs from b16 in vision.image_size (320 instead of 256)"),
        ),
        (
            changed("siglip_l16_256", vision={"patch_size": 32}, text={"context_length": 8}),
            (
                "SigLIP L/16, 256 px",
                "differs from siglip_l16_256 in vision.patch_size (32 instead of 16), "
                "text.context_length (8 instead of 64)",
            ),
        ),
        (
            SiglipConfig(VisionConfig(width=48, depth=3, heads=3), TextConfig(width=16, depth=5, heads=2)),
            ("model of its own sizes, 224 px", "unlike any in conf/model"),
        ),
    ],
)
def test_a_model_is_named_after_the_nearest(config: SiglipConfig, expected: tuple[str, str]) -> None:
    assert likeness(config) == expected
