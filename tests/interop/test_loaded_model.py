"""`LoadedModel` in the hands of a person: lists, paths, batches, order, zero-shot, and mistakes in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_train import load_model
from siglip_train.errors import UserError
from siglip_train.interop.loaded_model import LoadedModel
from siglip_train.interop.native import Description, write_export
from siglip_train.models.siglip import Siglip
from tests.models.small import small_config

SIZES = [(20, 31), (64, 16), (16, 16), (9, 50), (33, 33), (100, 7), (48, 48)]
LABELS = ["a red cat", "the blue dog", "my fox"]


@pytest.fixture(scope="module", params=["fixed", "naflex"])
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path
) -> LoadedModel:
    config = small_config(position_grid=4 if request.param == "naflex" else None)
    config.text.vocab_size, config.text.context_length = 40, 16
    torch.manual_seed(0)
    model = Siglip(config)
    with torch.no_grad():
        # away from the start, where the bias alone decides
        model.logit_bias.fill_(0.3)
    folder = tmp_path_factory.mktemp("models") / "model"
    write_export(folder, model.state_dict(), Description(config, sentencepiece_model))
    return load_model(folder)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths


def embedded_one_by_one(loaded: LoadedModel, pictures: list[Image.Image]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([loaded.model.encode_image(loaded.preprocess(picture)) for picture in pictures])


def test_preprocess_takes_one_image_or_many_and_paths(
    loaded: LoadedModel, pictures: list[Image.Image], paths: list[Path]
) -> None:
    joined = loaded.preprocess(pictures)
    assert joined.patches.shape == (7, 16, 48)
    assert joined.grid.shape == (7, 16, 2)
    for row, (picture, path) in enumerate(zip(pictures, paths, strict=True)):
        for one in (picture, path, str(path), [path]):
            images = loaded.preprocess(one)
            assert torch.equal(images.patches[0], joined.patches[row])
            assert torch.equal(images.grid[0], joined.grid[row])
    assert loaded.preprocess([]).patches.shape[:2] == (0, 16)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_images_are_embedded_in_order_at_any_batch_size(
    loaded: LoadedModel, pictures: list[Image.Image], paths: list[Path], batch_size: int
) -> None:
    expected = embedded_one_by_one(loaded, pictures)
    mixed = [
        path if number % 2 else picture
        for number, (path, picture) in enumerate(zip(paths, pictures, strict=True))
    ]
    for images in (pictures, paths, mixed, iter(paths)):
        found = loaded.embed_images(images, batch_size=batch_size)
        assert (found.dtype, found.device.type, found.requires_grad) == (torch.float32, "cpu", False)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # rows are told apart by far more than that
    assert torch.pdist(expected).min() > 1e-3
    torch.testing.assert_close(found.norm(dim=1), torch.ones(7))


def test_texts_are_embedded_in_order_at_any_batch_size(loaded: LoadedModel) -> None:
    texts = ["a red cat", "a blue dog", "a blue", "the lazy fox jumps over", "dog"]
    with torch.no_grad():
        expected = loaded.model.encode_text(loaded.tokenize(texts))
    for batch_size in (1, 2, 64):
        torch.testing.assert_close(
            loaded.embed_texts(iter(texts), batch_size=batch_size), expected, rtol=0, atol=1e-6
        )
    # one text is a text, not its letters
    torch.testing.assert_close(loaded.embed_texts(texts[0]), expected[:1], rtol=0, atol=1e-6)
    assert torch.equal(loaded.tokenize(texts[0]), loaded.tokenize(texts[:1]))


def test_nothing_has_no_rows(loaded: LoadedModel) -> None:
    assert loaded.embed_images([]).shape == loaded.embed_texts([]).shape == (0, 24)


def test_a_single_template_gives_the_sigmoid_of_each_pairs_own_logit(
    loaded: LoadedModel, paths: list[Path]
) -> None:
    images, model = loaded.embed_images(paths), loaded.model
    for templates, texts in (
        (("{}",), LABELS),
        (["a photo of a {}."], [f"a photo of a {label}." for label in LABELS]),
    ):
        logits = images @ loaded.embed_texts(texts).T * model.logit_scale.exp() + model.logit_bias
        found = loaded.zero_shot(paths, LABELS, templates=templates, batch_size=2)
        assert found.shape == (7, 3)
        torch.testing.assert_close(found, logits.sigmoid().detach(), rtol=0, atol=1e-6)
    # labels are texts of their own where nothing is said
    assert torch.equal(loaded.zero_shot(paths, LABELS), loaded.zero_shot(paths, LABELS, templates=["{}"]))


def test_several_templates_are_averaged_as_unit_vectors(loaded: LoadedModel, paths: list[Path]) -> None:
    templates = ["a photo of {c}", "{} jumps over my dog", "the {}"]
    classes = []
    for label in LABELS:
        mean = loaded.embed_texts([f"a photo of {label}", f"{label} jumps over my dog", f"the {label}"]).mean(
            0
        )
        classes.append(mean / mean.norm())
    logits = loaded.embed_images(paths) @ torch.stack(classes).T * loaded.model.logit_scale.exp()
    expected = torch.sigmoid(logits + loaded.model.logit_bias).detach()
    found = loaded.zero_shot(paths, LABELS, templates=templates)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - loaded.zero_shot(paths, LABELS)).abs().max() > 1e-3


def test_labels_and_templates_may_be_files(loaded: LoadedModel, paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(LABELS) + "\n")
    (tmp_path / "templates.txt").write_text("a photo of {}\n")
    found = loaded.zero_shot(paths, str(tmp_path / "names.txt"), templates=str(tmp_path / "templates.txt"))
    assert torch.equal(found, loaded.zero_shot(paths, LABELS, templates=["a photo of {}"]))


def test_an_image_that_is_still_closed_may_stand_in_the_list_twice(
    loaded: LoadedModel, paths: list[Path]
) -> None:
    """Pillow reads a file when its pixels are asked for, and must not be asked by two threads at once."""
    with Image.open(paths[0]) as picture:
        rows = loaded.embed_images([picture] * 40, batch_size=8)
    torch.testing.assert_close(rows, rows[:1].expand(40, -1), rtol=0, atol=1e-6)


def test_embeddings_can_be_trained_on(loaded: LoadedModel, paths: list[Path]) -> None:
    probe = torch.nn.Linear(24, 2)
    probe(loaded.embed_images(paths)).sum().backward()
    assert probe.weight.grad is not None


def test_bf16_is_autocast_and_stays_close(loaded: LoadedModel, paths: list[Path]) -> None:
    low = load_model(loaded.source, precision="bf16")
    assert low.model.logit_scale.dtype == torch.float32
    found, expected = low.embed_images(paths), loaded.embed_images(paths)
    assert found.dtype == torch.float32
    difference = (found - expected).abs().max()
    # measured 3e-3
    assert 0 < difference < 2e-2
    assert load_model(loaded.source).precision == "fp32"


def mistakes(tmp_path: Path) -> dict[str, tuple[object, str]]:
    """Images that are none, and what is said of them."""
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").touch()
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    return {
        "missing": (tmp_path / "missing.jpg", "missing.jpg: No such file or directory"),
        "folder": (tmp_path, f"{tmp_path}: Is a directory"),
        "text": (str(tmp_path / "text.jpg"), "text.jpg: broken image"),
        "empty": (tmp_path / "empty.png", "empty.png: empty image"),
        "cut": (tmp_path / "cut.png", "cut.png: broken image"),
        "cut, opened": (Image.open(tmp_path / "cut.png"), "cut.png: "),
        "array": (np.zeros((8, 8, 3), np.uint8), "not ndarray; Image.fromarray"),
    }


def test_a_bad_image_is_named(loaded: LoadedModel, paths: list[Path], tmp_path: Path) -> None:
    for name, (image, message) in mistakes(tmp_path).items():
        for use in (loaded.preprocess, loaded.embed_images, lambda images: loaded.zero_shot(images, LABELS)):
            with pytest.raises(UserError) as raised:
                use([*paths, image, *paths])
            assert message in str(raised.value), name
            assert "\n" not in str(raised.value), name


def test_other_mistakes_are_one_line(loaded: LoadedModel, paths: list[Path]) -> None:
    for use, message in (
        (lambda: loaded.embed_images(paths, batch_size=0), "batch_size is 0"),
        (lambda: loaded.zero_shot(paths, []), "no class name"),
        (lambda: loaded.zero_shot(paths, "a cat"), "the class names: cannot read a cat"),
        (lambda: loaded.zero_shot(paths, LABELS, templates=["a cat"]), "has no place for the class name"),
        (lambda: load_model(loaded.source, device="gpu"), "device=gpu is not known"),
        (lambda: load_model(loaded.source, precision="fp16"), "precision=fp16 is not known"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError) as raised:
            use()
        assert message in str(raised.value)


def test_a_gpu_that_is_not_there_is_said(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda:1, but torch sees no GPU on this machine"):
        load_model(loaded.source, device="cuda:1")
    assert load_model(loaded.source, device="auto").model.logit_scale.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_rows_come_back_to_the_cpu(loaded: LoadedModel, paths: list[Path]) -> None:
    expected = loaded.zero_shot(paths, LABELS)
    for precision, limit in (("fp32", 1e-3), ("auto", 5e-2)):
        on_gpu = load_model(loaded.source, device="auto", precision=precision)
        assert on_gpu.model.logit_scale.device.type == "cuda"
        found = on_gpu.zero_shot(paths, LABELS)
        assert (found.device.type, found.dtype) == ("cpu", torch.float32)
        torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def test_a_bar_is_shown_on_a_terminal_alone(
    loaded: LoadedModel, paths: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    loaded.zero_shot(paths, LABELS)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    loaded.embed_images(paths, progress=False)
    assert capsys.readouterr() == ("", "")
    loaded.zero_shot(paths, LABELS)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "embedding texts" in shown.err
    assert "embedding images" in shown.err
    assert "7/7" in shown.err
