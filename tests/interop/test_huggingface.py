"""HuggingFace folders: the outputs and gradients of transformers, and every way such a folder can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from siglip_train.batch import Images
from siglip_train.errors import UserError
from siglip_train.interop.huggingface import describe_huggingface, read_huggingface
from siglip_train.interop.load import load_model
from siglip_train.interop.names import translate
from siglip_train.models.siglip import Siglip
from siglip_train.models.vision import patchify
from tests.goldens import arrays, golden_folder

CASES = ["hf_siglip_b8_i32", "hf_siglip_so14_i42", "hf_siglip_eps_detector", "hf_siglip2_nf_p8_g4"]
# goldens/README.md
TOKENS, POOLED, NORMALISED, LOGITS, LOSS = 2e-5, 1.5e-5, 2e-6, 2e-5, 1e-5


def open_case(name: str) -> Siglip:
    files = read_huggingface(golden_folder(name))
    model = Siglip(files.description.config)
    model.load_state_dict(files.state)
    return model


def images_of(model: Siglip, inputs: dict[str, np.ndarray]) -> Images:
    if "pixel_values" in inputs:
        return patchify(torch.from_numpy(inputs["pixel_values"]), model.config.vision.patch_size)
    mask = torch.from_numpy(inputs["pixel_attention_mask"]).bool()
    width = torch.from_numpy(inputs["spatial_shapes"][:, 1:])
    place = torch.arange(mask.shape[1])[None]
    grid = torch.stack([place // width, place % width], dim=-1) * mask[..., None]
    return Images(torch.from_numpy(inputs["pixel_values_garbage_pad"]), grid, mask)


def logits_of(model: Siglip, image: Tensor, text: Tensor) -> Tensor:
    return model.logit_scale.exp() * image @ text.T + model.logit_bias


def loss_of(logits: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / len(logits)


def close(ours: Tensor, theirs: np.ndarray, atol: float) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=atol)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_image_side_equals_transformers(name: str) -> None:
    model, inputs = open_case(name), arrays(name, "inputs.npz")
    expected = arrays(name, "expected_f32.npz")
    images = images_of(model, inputs)
    features = model.vision(*images)
    real = images.mask if images.mask is not None else torch.ones(features.tokens.shape[:2], dtype=torch.bool)
    close(features.tokens[real], expected["vision_last_hidden_state"][real.numpy()], TOKENS)
    close(features.pooled, expected["image_pooled"], POOLED)
    close(model.encode_image(images), expected["full/image_embeds"], NORMALISED)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("case", ["full", "pad_nomask"])
@torch.no_grad()
def test_text_side_and_logits_equal_transformers(name: str, case: str) -> None:
    model, inputs = open_case(name), arrays(name, "inputs.npz")
    expected = arrays(name, "expected_f32.npz")
    tokens = torch.from_numpy(inputs["input_ids_full" if case == "full" else "input_ids_pad"])
    features = model.text(tokens)
    close(features.tokens, expected[f"{case}/text_last_hidden_state"], TOKENS)
    close(features.pooled, expected[f"{case}/text_pooled"], POOLED)
    text = model.encode_text(tokens)
    close(text, expected[f"{case}/text_embeds"], NORMALISED)
    logits = logits_of(model, model.encode_image(images_of(model, inputs)), text)
    close(logits.T, expected[f"{case}/logits_per_image"].T, LOGITS)
    close(loss_of(logits), expected[f"{case}/loss"], LOSS)


@torch.no_grad()
def test_garbage_in_padding_is_not_seen() -> None:
    name = "hf_siglip2_nf_p8_g4"
    model, inputs = open_case(name), arrays(name, "inputs.npz")
    images = images_of(model, inputs)
    zeros = images._replace(patches=images.patches * images.mask[..., None])
    assert torch.equal(model.encode_image(images), model.encode_image(zeros))


@pytest.mark.parametrize("name", ["hf_siglip_b8_i32", "hf_siglip2_nf_p8_g4"])
def test_gradients_equal_transformers(name: str) -> None:
    model, inputs = open_case(name).double(), arrays(name, "inputs.npz")
    images = images_of(model, inputs)
    image = model.encode_image(images._replace(patches=images.patches.double()))
    text = model.encode_text(torch.from_numpy(inputs["input_ids_pad"]))
    loss_of(logits_of(model, image, text)).backward()
    theirs = load_file(golden_folder(name) / "grads_pad_nomask.safetensors")
    weights = load_file(golden_folder(name) / "model.safetensors")
    # the NaFlex case holds the gradients of the vision side only
    compared = {key for key in theirs if key in weights}
    full = {key: theirs.get(key, torch.zeros_like(value)) for key, value in weights.items()}
    expected = translate(full, model.config, "huggingface", where=Path(name))
    checked = 0
    for key, parameter in model.named_parameters():
        if key.startswith("text.") and not any(known.startswith("text_model") for known in compared):
            continue
        scale = expected[key].abs().max().item()
        atol = 5e-6 if key.endswith("key.bias") else 2e-5 * scale
        torch.testing.assert_close(parameter.grad.float(), expected[key], rtol=0, atol=atol, msg=key)
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
@torch.no_grad()
def test_a_folder_transformers_has_just_written(tmp_path: Path, family: str) -> None:
    """The same comparison without stored outputs, for this version of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    extent = {"image_size": 16} if family == "Siglip" else {"num_patches": 16}
    config = getattr(transformers, f"{family}Config")(
        vision_config={**sizes, **extent, "patch_size": 4},
        text_config={**sizes, "vocab_size": 30, "max_position_embeddings": 6, "projection_size": 24},
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4 + parameter)
    theirs.save_pretrained(tmp_path)

    files = read_huggingface(tmp_path)
    ours = Siglip(files.description.config)
    ours.load_state_dict(files.state)
    pixels, tokens = torch.randn(3, 3, 16, 16), torch.randint(30, (3, 6))
    inputs = {"pixel_values": pixels}
    if family == "Siglip2":
        inputs = {
            "pixel_values": patchify(pixels, 4).patches,
            "pixel_attention_mask": torch.ones(3, 16, dtype=torch.int64),
            "spatial_shapes": torch.full((3, 2), 4),
        }
    expected = theirs(input_ids=tokens, **inputs)
    torch.testing.assert_close(ours.encode_image(pixels), expected.image_embeds, rtol=0, atol=NORMALISED)
    torch.testing.assert_close(ours.encode_text(tokens), expected.text_embeds, rtol=0, atol=NORMALISED)
    assert ours.logit_scale == theirs.logit_scale
    assert ours.logit_bias == theirs.logit_bias


def test_config_is_read_in_full() -> None:
    config = read_huggingface(golden_folder("hf_siglip_b8_i32")).description.config
    vision, text = config.vision, config.text
    assert (vision.image_size, vision.patch_size, vision.width, vision.depth) == (32, 8, 64, 3)
    assert (vision.mlp_dim, vision.heads, vision.gelu, vision.position_grid) == (192, 4, "tanh", None)
    assert (text.context_length, text.vocab_size, text.width, text.depth) == (16, 300, 64, 2)
    assert (text.mlp_dim, text.heads, text.gelu, text.projection) == (200, 4, "tanh", True)
    naflex = read_huggingface(golden_folder("hf_siglip2_nf_p8_g4")).description
    assert (naflex.config.vision.image_size, naflex.config.vision.position_grid) == (32, 4)
    assert naflex.resize == "bilinear"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of a small folder."""
    target = tmp_path / "model"
    shutil.copytree(golden_folder("hf_siglip_eps_detector"), target)
    return target


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_sharded_weights_read_as_one(folder: Path) -> None:
    whole = read_huggingface(folder).state
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    state = read_huggingface(folder).state
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], whole[name]) for name in whole)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": list(shards)}))
    with pytest.raises(UserError, match=r"index\.json: weight_map: expected a mapping, got \['model-00001"):
        read_huggingface(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002"):
        read_huggingface(folder)


def test_half_precision_files_become_fp32(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    assert {tensor.dtype for tensor in read_huggingface(folder).state.values()} == {torch.float32}


def test_old_position_id_buffers_are_no_weights(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(16)[None]}))
    read_huggingface(folder)


def test_a_model_without_text_head_has_no_projection(folder: Path) -> None:
    edit_weights(folder, lambda t: [t.pop(f"text_model.head.{leaf}") for leaf in ("weight", "bias")])
    files = read_huggingface(folder)
    assert not files.description.config.text.projection
    Siglip(files.description.config).load_state_dict(files.state)


WRONG_WEIGHTS = [
    (lambda t: t.pop("text_model.final_layer_norm.bias"), "missing: text_model.final_layer_norm.bias"),
    (lambda t: t.update({"decoder.weight": torch.ones(2)}), "unexpected: decoder.weight"),
    (
        lambda t: t.update({"vision_model.head.attention.in_proj_weight": torch.ones(64, 32)}),
        r"misshapen: vision_model.head.attention.in_proj_weight \[64, 32\]",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG_WEIGHTS)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Callable, message: str) -> None:
    edit_weights(folder, change)
    with pytest.raises(UserError, match=message):
        read_huggingface(folder)


WRONG_CONFIGS = [
    (lambda c: c["vision_config"].update(hidden_act="relu"), "hidden_act relu"),
    (lambda c: c["text_config"].update(layer_norm_eps=1e-5), "layer_norm_eps 1e-05"),
    (
        lambda c: c["vision_config"].update(vision_use_head=False),
        r"no parameters that begin with vision\.pool\.",
    ),
    (lambda c: c["text_config"].update(projection_size=7), "projection_size 7"),
    (lambda c: c.update(vision_config=None), "vision_config: expected a group of keys, got None"),
    (
        lambda c: c["vision_config"].update(hidden_size="128"),
        r"vision_config\.hidden_size: expected int, got '128'",
    ),
    (
        lambda c: c["text_config"].update(layer_norm_eps="small"),
        "layer_norm_eps: expected float, got 'small'",
    ),
    (lambda c: c["text_config"].update(num_attention_heads=0), "text: heads must be at least 1, got 0"),
    (lambda c: c["vision_config"].update(patch_size=-4), "vision: patch_size must be at least 1, got -4"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_CONFIGS)
def test_models_that_are_no_siglip_are_refused(folder: Path, change: Callable, message: str) -> None:
    edit_config(folder, change)
    with pytest.raises(UserError, match=message):
        read_huggingface(folder)


@pytest.mark.parametrize(
    ("name", "model_type", "message"),
    [
        ("hf_siglip_eps_detector", "siglip2", r"siglip2, whose stem .* is linear, but .*weight is \[32, 3, "),
        (
            "hf_siglip2_nf_p8_g4",
            "siglip",
            r"siglip, whose stem .* is a convolution, but .*weight is \[64, 192\]",
        ),
    ],
)
def test_a_stem_of_the_other_class_is_refused(
    tmp_path: Path, name: str, model_type: str, message: str
) -> None:
    """As transformers does; fixed resolution and NaFlex share every other name."""
    folder = shutil.copytree(golden_folder(name), tmp_path / "model")
    grid = {"image_size": 32, "num_patches": 16}

    def relabel(content: dict) -> None:
        content.update(model_type=model_type, architectures=None)
        content["vision_config"].update(grid)

    edit_config(folder, relabel)
    with pytest.raises(UserError, match=message):
        read_huggingface(folder)


@pytest.mark.parametrize("name", ["SiglipTextModel", "Siglip2Model", "SiglipForMaskedLM"])
def test_a_class_that_is_not_the_image_text_model_is_refused(folder: Path, name: str) -> None:
    edit_config(folder, lambda c: c.update(architectures=[name]))
    with pytest.raises(
        UserError, match=rf"a {name} is not SiglipModel, the image-text model of model_type siglip"
    ):
        read_huggingface(folder)


def test_damaged_files_are_told(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read the weights"):
        read_huggingface(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        read_huggingface(folder)


@pytest.mark.parametrize(
    ("tokenizer_class", "vocabulary", "expected"),
    [
        ("SiglipTokenizer", 50, (True, "eos")),
        ("GemmaTokenizerFast", 50, (False, "pad")),
        ("Siglip2Tokenizer", 50, (False, "pad")),
        (None, 50, (True, "eos")),
        (None, 256000, (False, "pad")),
        ("TokenizersBackend", 256000, (False, "pad")),
        ("TokenizersBackend", 50, (True, "eos")),
        ("TokenizersBackend <pad> <eos>", 50, (False, "pad")),
        ("PreTrainedTokenizerFast </s> </s>", 50, (True, "eos")),
    ],
)
def test_text_rules_follow_the_tokenizer(
    folder: Path, tokenizer_class: str | None, vocabulary: int, expected: tuple
) -> None:
    """The generic classes of transformers 5 say nothing; the tokens that stand beside them do."""
    if tokenizer_class:
        name, *tokens = tokenizer_class.split()
        declared = dict(zip(("pad_token", "eos_token"), tokens, strict=False))
        content = {"tokenizer_class": name, **declared}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
    edit_config(folder, lambda c: c["text_config"].update(vocab_size=vocabulary))
    name = "text_model.embeddings.token_embedding.weight"
    edit_weights(folder, lambda t: t.update({name: torch.zeros(vocabulary, 32)}))
    rules = read_huggingface(folder).description.rules
    assert rules.lowercase
    assert (rules.strip_punctuation, rules.pad) == expected


def test_preprocessor_config_decides_the_filter(folder: Path) -> None:
    assert read_huggingface(folder).description.resize == "bicubic"
    preprocessor = folder / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({"resample": 2, "image_mean": [0.5] * 3}))
    assert read_huggingface(folder).description.resize == "bilinear"
    preprocessor.write_text(json.dumps({"resample": 2, "image_mean": [0.48, 0.46, 0.41]}))
    with pytest.raises(UserError, match="image_mean"):
        read_huggingface(folder)
    preprocessor.write_text(json.dumps({"resample": 1}))
    with pytest.raises(UserError, match="resample 1"):
        read_huggingface(folder)


def test_processor_config_comes_before_preprocessor_config(folder: Path) -> None:
    """transformers 5 nests one in the other, and reads what is nested first."""
    (folder / "preprocessor_config.json").write_text(json.dumps({"resample": 3}))
    processor = folder / "processor_config.json"
    processor.write_text(json.dumps({"processor_class": "SiglipProcessor"}))
    assert read_huggingface(folder).description.resize == "bicubic"
    processor.write_text(json.dumps({"image_processor": {"resample": 2, "image_std": [0.5] * 3}}))
    assert read_huggingface(folder).description.resize == "bilinear"
    for nested, message in (
        ({"image_std": [0.27, 0.26, 0.28]}, r"processor_config.json: image_std \[0.27"),
        ({"do_normalize": False}, "do_normalize false is not supported"),
    ):
        processor.write_text(json.dumps({"image_processor": nested}))
        with pytest.raises(UserError, match=message):
            read_huggingface(folder)


def written(folder: Path, name: str, **vision: object) -> Path:
    """A folder of one of transformers' classes, with random weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        vision_config={**sizes, "image_size": 16, "patch_size": 4, **vision},
        text_config={**sizes, "vocab_size": 30, "max_position_embeddings": 6, "projection_size": 24},
    )
    part = config.vision_config if name == "SiglipVisionModel" else config
    getattr(transformers, name)(part).save_pretrained(folder)
    return folder


SKIP = ["text.", "logit_"]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_an_image_tower_alone_is_read_as_that(tmp_path: Path, has_prefix: bool) -> None:
    """With and without `vision_model.` before its names: versions of transformers differ."""
    folder = written(tmp_path, "SiglipVisionModel")
    # copies, as a file that is mapped into memory is written anew
    tensors = {name.removeprefix("vision_model."): value.clone()
               for name, value in load_file(folder / "model.safetensors").items()}  # fmt: skip
    start = "vision_model." if has_prefix else ""
    save_file({start + name: value for name, value in tensors.items()}, folder / "model.safetensors")
    files = read_huggingface(folder, SKIP)
    assert files.description.absent == ("text.", "logit_")
    stem = tensors["embeddings.patch_embedding.weight"].permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(files.state["vision.patch_embedding.weight"], stem)
    assert {name.split(".")[0] for name in files.state} == {"vision"}
    with pytest.raises(
        UserError, match=r"no parameters that begin with text\., logit_; a training can start"
    ):
        read_huggingface(folder)


def test_a_classifier_gives_its_image_tower(tmp_path: Path) -> None:
    files = read_huggingface(written(tmp_path, "SiglipForImageClassification"), [*SKIP, "vision.pool."])
    assert files.description.absent[:2] == ("text.", "logit_")
    assert files.state.keys() >= {"vision.position_table", "vision.encoder.blocks.1.mlp.fc2.bias"}
    assert not any("classifier" in name for name in files.state)


def test_a_tower_without_its_pooling_head_lacks_that_too(tmp_path: Path) -> None:
    """As PaliGemma has it."""
    folder = written(tmp_path, "SiglipVisionModel", vision_use_head=False)
    assert describe_huggingface(folder).absent == ("text.", "logit_", "vision.pool.")
    assert "vision.position_table" in read_huggingface(folder, [*SKIP, "vision.pool."]).state


def test_a_language_model_around_the_tower_is_told_from_a_model(tmp_path: Path, folder: Path) -> None:
    for config in (
        {"model_type": "paligemma", "vision_config": {"model_type": "siglip_vision_model"}},
        {"model_type": "llava_qwen", "mm_vision_tower": "google/siglip-so400m-patch14-384"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            UserError, match=rf"a whole {config['model_type']} with a language model, .*save that"
        ):
            load_model(tmp_path)
    edit_weights(folder, lambda t: [t.update({f"vision_tower.{name}": t.pop(name)}) for name in list(t)])
    with pytest.raises(UserError, match=r"called vision_tower\.vision_model\.…, as in a dump of a larger"):
        read_huggingface(folder)
