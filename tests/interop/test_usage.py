"""Every line of code on a model card runs, and gives the numbers that our own model gives.

That of ONNX graphs, which take long to make, runs where `test_conversion.py` has made them.
"""

import re
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.tokenizer.train import TrainingOptions, train_tokenizer
from siglip_train.interop import probe
from siglip_train.interop.conversion import Request, convert
from siglip_train.interop.load import load_model
from siglip_train.interop.loaded_model import LoadedModel
from siglip_train.interop.native import Description, write_export
from siglip_train.interop.usage import usage
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.models.vision import VisionConfig, patchify
from tests.interop.test_classifier import NAMES, build_run
from tests.models.small import small_config

TEXTS = ["a photo of a cat", "a photo of a dog"]
# measured 4e-7
LIMIT = 3e-6
Values = dict[str, Any]


class Variant(NamedTuple):
    """What a model is like; the pipelines of transformers take texts for 64 tokens long."""

    naflex: bool
    length: int
    has_tokenizer: bool = True


SHORT, USUAL = Variant(naflex=False, length=12), Variant(naflex=False, length=64)
NAFLEX_SHORT, NAFLEX = Variant(naflex=True, length=12), Variant(naflex=True, length=64)
NO_TEXTS = Variant(naflex=False, length=12, has_tokenizer=False)


def near(found: Any, expected: Any) -> None:
    found = torch.as_tensor(found).detach().squeeze()
    torch.testing.assert_close(found, torch.as_tensor(expected).squeeze(), rtol=0, atol=LIMIT)


def check_pairs(values: Values, loaded: LoadedModel) -> None:
    near(values["output"].image_embeds, loaded.embed_images("image.jpg"))
    near(values["output"].text_embeds, loaded.embed_texts(TEXTS))
    near(values["probabilities"], loaded.zero_shot("image.jpg", TEXTS))


def check_classes(values: Values, loaded: LoadedModel) -> None:
    found = {row["label"]: row["score"] for row in values["found"]}
    near([found["cat"], found["dog"]], loaded.zero_shot("image.jpg", TEXTS))


def check_features(values: Values, loaded: LoadedModel) -> None:
    features = torch.tensor(values["features"])
    near(torch.nn.functional.normalize(features, dim=-1), loaded.embed_images("image.jpg"))


def check_embeddings(values: Values, loaded: LoadedModel) -> None:
    images, texts = loaded.embed_images("image.jpg"), loaded.embed_texts(TEXTS)
    near(values["images"], images)
    near(values["texts"], texts)
    near(values["cosines"], images @ texts.T)


def check_images(values: Values, loaded: LoadedModel) -> None:
    near(values["images"], loaded.embed_images("image.jpg"))


def check_averaged(values: Values, loaded: LoadedModel) -> None:
    near(values["images"], loaded.embed_images("image.jpg"))
    near(values["texts"][:1], loaded.embed_texts(TEXTS[:1]))
    expected = loaded.zero_shot("image.jpg", ["cat", "dog"], templates=["a photo of a {}", "a {}"])
    near(values["probabilities"], expected)


def check_native(values: Values, loaded: LoadedModel) -> None:
    near(values["texts"], loaded.embed_texts(TEXTS))
    check_averaged(values, loaded)


def check_tokens(values: Values, loaded: LoadedModel) -> None:
    with torch.no_grad():
        near(values["tokens"], loaded.model.vision.layer_tokens(loaded.preprocess("image.jpg"), -2))


def check_logits(values: Values, loaded: LoadedModel) -> None:
    assert values["logits"].shape == (1, 3)
    assert values["name"] == NAMES[values["logits"].argmax()]


def check_names(values: Values, loaded: LoadedModel) -> None:
    assert sorted(row["label"] for row in values["found"]) == sorted(NAMES)
    assert sum(row["score"] for row in values["found"]) == pytest.approx(1)


def check_place(values: Values, loaded: LoadedModel) -> None:
    assert (
        values["config"]["model_cfg"]["vision_cfg"]["timm_model_name"]
        == f"local-dir:{values['folder']}/trunk"
    )


# of each form: a word that only this piece of code has, and what its values must be
PIECES: dict[str, dict[str, Callable[[Values, LoadedModel], None]]] = {
    "hf": {
        "AutoProcessor": check_pairs,
        "zero-shot-image-classification": check_classes,
        "image-feature-extraction": check_features,
        "sentence_transformers": check_embeddings,
    },
    "vision": {"AutoImageProcessor": check_tokens, "image-feature-extraction": check_features},
    "classifier": {"AutoImageProcessor": check_logits, '"image-classification"': check_names},
    "open_clip": {"build_zero_shot_classifier": check_averaged, "timm_model_name": check_place},
    "native": {"load_model": check_native},
}
CASES = [
    *(("hf", variant) for variant in (SHORT, USUAL, NAFLEX_SHORT, NAFLEX)),
    *((form, variant) for form in ("vision", "classifier", "native") for variant in (SHORT, NAFLEX_SHORT)),
    *(("open_clip", variant) for variant in (SHORT, USUAL)),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    train_tokenizer((TEXTS + list(probe.TEXTS)) * 20, path, TrainingOptions(400))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Callable[[str, Variant], Path]:
    """An export of each form, made once: `name/name` lies beside `image.jpg`, and `name/source` is what it is of."""

    @cache
    def write(form: str, variant: Variant) -> Path:
        home = tmp_path_factory.mktemp(form)
        write_image(home / "image.jpg")
        if form == "classifier":
            build_run(home / "source", "kind", position_grid=4 if variant.naflex else None)
            request = Request("hf", part="classifier", class_names=NAMES)
        else:
            write_source(home / "source", variant, tokenizer)
            request = Request("hf", part="vision") if form == "vision" else Request(form)
        convert(home / "source", home / "our-model", request)
        return home

    return write


def write_image(path: Path) -> None:
    """Of the size that the models take, as libraries resize with differences of a level or two."""
    noise = np.random.default_rng(5).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((16, 16)).save(path, quality=90)


def write_source(folder: Path, variant: Variant, tokenizer: Path) -> None:
    config = small_config(position_grid=4 if variant.naflex else None)
    config.text.vocab_size, config.text.context_length = 400, variant.length
    torch.manual_seed(1)
    model = Siglip(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
        # so that probabilities are neither 0 nor 1
        model.logit_bias.fill_(0.5)
    write_export(
        folder, model.state_dict(), Description(config, tokenizer if variant.has_tokenizer else None)
    )


def code_of(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", card.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("form", "variant", "word"),
    [(form, variant, word) for form, variant in CASES for word in PIECES[form]],
    ids=lambda part: "-".join(map(str, part)) if isinstance(part, Variant) else part,
)
def test_the_code_of_a_card_runs_and_gives_our_numbers(
    written: Callable[[str, Variant], Path],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    variant: Variant,
    word: str,
) -> None:
    pytest.importorskip("transformers")
    if word == "sentence_transformers":
        pytest.importorskip(word)
    home = written(form, variant)
    monkeypatch.chdir(home)
    (piece,) = [code for code in code_of(home / "our-model" / "README.md") if word in code]
    values: Values = {}
    exec(piece, values)
    PIECES[form][word](values, load_model("source"))


@pytest.mark.parametrize(("form", "variant"), CASES, ids=str)
def test_no_code_of_a_card_is_left_out(
    written: Callable[[str, Variant], Path], form: str, variant: Variant
) -> None:
    pytest.importorskip("transformers")
    pieces = code_of(written(form, variant) / "our-model" / "README.md")
    assert [[word for word in PIECES[form] if word in piece] for piece in pieces] == [
        [word] for word in PIECES[form]
    ]


@pytest.mark.parametrize("form", ["hf", "open_clip", "native"])
def test_without_a_tokenizer_a_card_speaks_of_images_alone(
    written: Callable[[str, Variant], Path], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    pytest.importorskip("transformers")
    home = written(form, NO_TEXTS)
    monkeypatch.chdir(home)
    piece, *others = code_of(home / "our-model" / "README.md")
    assert ["timm_model_name" in code for code in others] == [True] * (form == "open_clip")
    values: Values = {}
    exec(piece, values)
    (check_features if form == "hf" else check_images)(values, load_model("source"))


@pytest.mark.parametrize("variant", [SHORT, NAFLEX_SHORT], ids=str)
@pytest.mark.parametrize(
    ("options", "levels"),
    # measured 0 and 1; through Pillow is exact
    [({"use_fast": False}, 0), ({"backend": "pil"}, 0), ({"backend": "torchvision"}, 1), ({}, 1)],
    ids=str,
)
def test_image_processors_of_transformers_resize_as_we_do(
    written: Callable[[str, Variant], Path], variant: Variant, options: dict, levels: int
) -> None:
    transformers = pytest.importorskip("transformers")
    if "backend" in options and find_spec("transformers.image_processing_backends") is None:
        pytest.skip("this version of transformers has no backends to choose from")
    # NaFlex keeps the shape, and we do not; squares of any size come out the same
    sizes = [(40, 40), (100, 100), (16, 16), *(() if variant.naflex else ((37, 211), (90, 20)))]
    random = np.random.default_rng(3)
    images = [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]
    home = written("hf", variant)
    processor = transformers.AutoImageProcessor.from_pretrained(home / "our-model", **options)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    patches = pixels if variant.naflex else patchify(pixels, 4).patches  # [B, L, P] in -1..1
    expected = load_model(home / "source").preprocess(images).patches
    difference = ((patches + 1) * 127.5 - expected).abs().max().item()
    assert difference < levels + 1e-3


def test_a_folder_of_open_clip_that_was_moved_is_told_where_it_is(
    written: Callable[[str, Variant], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_clip = pytest.importorskip("open_clip")
    home = written("open_clip", SHORT)
    shutil.copytree(home / "our-model", tmp_path / "our-model")
    config = tmp_path / "our-model" / "open_clip_config.json"
    config.write_text(config.read_text().replace(str(home), str(tmp_path / "as it was")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_clip.create_model("local-dir:our-model")
    # we look beside the config by ourselves
    ours = load_model("our-model").model.vision.state_dict()
    (piece,) = [code for code in code_of(Path("our-model/README.md")) if "timm_model_name" in code]
    exec(piece, {})
    theirs = open_clip.create_model("local-dir:our-model").visual.trunk
    assert torch.equal(theirs.norm.weight, ours["encoder.norm.weight"])


def test_a_size_that_timm_has_a_name_for_may_be_moved() -> None:
    config = SiglipConfig(VisionConfig(image_size=256, gelu="erf"))
    assert len(usage("open_clip", config, "b16", has_tokenizer=True)) == 1


@pytest.mark.parametrize("variant", [SHORT, USUAL, NAFLEX_SHORT], ids=str)
@pytest.mark.parametrize("options", [{}, {"padding": True}, {"padding": "max_length"}], ids=str)
def test_a_processor_makes_texts_as_long_as_the_model_wants_them(
    written: Callable[[str, Variant], Path], variant: Variant, options: dict
) -> None:
    """The text tower reads the last position: texts padded to the longest of them would mean something else."""
    transformers = pytest.importorskip("transformers")
    home = written("hf", variant)
    processor = transformers.AutoProcessor.from_pretrained(home / "our-model")
    texts = [*TEXTS, "a", "on and on " * 40]
    found = processor(text=texts, return_tensors="pt", **options)["input_ids"]
    assert torch.equal(found, load_model(home / "source").tokenize(texts))
