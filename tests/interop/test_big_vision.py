"""big_vision's `.npz`: the outputs of big_vision, both layouts of blocks, and every way such a file can be wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from siglip_train.batch import Images
from siglip_train.errors import UserError
from siglip_train.interop.big_vision import read_big_vision
from siglip_train.interop.load import load_model, read_model
from siglip_train.models.siglip import Siglip
from siglip_train.models.vision import patchify
from tests.goldens import arrays, golden_folder
from tests.interop.flax_layout import flax_arrays
from tests.models.small import small_config, small_model

CASES = ["bv_vit_b8_i32", "bv_naflex_nf_p8_g4", "bv_naflex_width1"]


def images_of(model: Siglip, inputs: dict[str, np.ndarray]) -> Images:
    if "image_nhwc" in inputs:
        return patchify(torch.from_numpy(inputs["image_nhwc"]).permute(0, 3, 1, 2), 8)
    grid = torch.from_numpy(np.stack([inputs["yidx"], inputs["xidx"]], axis=-1))
    name = "pixel_values_garbage_pad" if "pixel_values_garbage_pad" in inputs else "pixel_values"
    return Images(
        torch.from_numpy(inputs[name]), grid, torch.from_numpy(inputs["pixel_attention_mask"]).bool()
    )


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_equal_big_vision(name: str) -> None:
    model = load_model(golden_folder(name) / "params.npz").model
    inputs, expected = arrays(name, "inputs.npz"), arrays(name, "expected_f32.npz")
    image = model.encode_image(images_of(model, inputs))
    torch.testing.assert_close(image, torch.from_numpy(expected["zimg"]), rtol=0, atol=2e-6)
    for case in ("input_ids_full", "input_ids_pad"):
        if case not in inputs:
            continue
        text = model.encode_text(torch.from_numpy(inputs[case]))
        torch.testing.assert_close(text, torch.from_numpy(expected[f"{case}/ztxt"]), rtol=0, atol=2e-6)
        logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
        torch.testing.assert_close(
            logits, torch.from_numpy(expected[f"{case}/logits"]), rtol=0, atol=2e-5, check_stride=False
        )


def test_the_sizes_are_read_off_the_arrays() -> None:
    description = read_big_vision(golden_folder("bv_vit_b8_i32") / "params.npz").description
    vision, text = description.config.vision, description.config.text
    assert (vision.image_size, vision.patch_size, vision.position_grid) == (32, 8, None)
    assert (vision.width, vision.depth, vision.mlp_dim, vision.heads) == (64, 3, 192, 4)
    assert (text.context_length, text.vocab_size, text.projection) == (16, 300, True)
    assert (text.width, text.depth, text.mlp_dim, text.heads) == (64, 2, 200, 4)
    assert (description.rules.pad, description.rules.strip_punctuation) == ("eos", False)
    naflex = read_big_vision(golden_folder("bv_naflex_nf_p8_g4") / "params.npz").description
    assert (naflex.config.vision.image_size, naflex.config.vision.position_grid) == (32, 4)
    assert naflex.rules.pad == "pad"


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("naflex", [False, True])
def test_a_model_of_ours_comes_back_bit_by_bit(tmp_path: Path, stacked: bool, naflex: bool) -> None:
    model = small_model(position_grid=4 if naflex else None)
    # no ending: the kind of file is seen from what is in it
    path = tmp_path / "weights"
    with path.open("wb") as file:
        np.savez(file, **flax_arrays(model, stacked=stacked))
    files = read_model(path)
    assert files.description.config == model.config
    assert files.state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, files.state[name]) for name, tensor in model.state_dict().items())


def small_arrays() -> dict[str, np.ndarray]:
    return flax_arrays(small_model(), stacked=True)


def test_a_text_tower_without_head(tmp_path: Path) -> None:
    config = small_config()
    config.text.width, config.text.heads, config.text.projection = 24, 3, False
    model = Siglip(config)
    np.savez(tmp_path / "m.npz", **flax_arrays(model))
    files = read_big_vision(tmp_path / "m.npz")
    assert files.description.config == config
    assert "text.head.weight" not in files.state


def test_the_prefix_is_optional_and_an_optimizer_is_no_weight(tmp_path: Path) -> None:
    content = small_arrays()
    np.savez(tmp_path / "bare.npz", **{name.removeprefix("params/"): a for name, a in content.items()})
    np.savez(tmp_path / "training.npz", **content, **{"opt/0/count": np.zeros(1)})
    for name in ("bare.npz", "training.npz"):
        state = read_big_vision(tmp_path / name).state
        assert all(torch.equal(tensor, state[key]) for key, tensor in small_model().state_dict().items())


def test_a_second_table_inside_the_encoder_is_added(tmp_path: Path) -> None:
    content = small_arrays()
    inner = np.full_like(content["params/txt/pos_embedding"], 2.5)
    np.savez(tmp_path / "old.npz", **content, **{"params/txt/Encoder_0/pos_embedding": inner})
    state = read_big_vision(tmp_path / "old.npz").state
    assert torch.equal(state["text.position_table"], small_model().text.position_table + 2.5)


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    """bfloat16, which numpy stores as two bytes without a meaning."""
    content = small_arrays()
    name = "params/img/embedding/bias"
    values = torch.randn(24).bfloat16()
    content[name] = values.view(torch.int16).numpy().view("V2")
    np.savez(tmp_path / "half.npz", **content)
    assert torch.equal(
        read_big_vision(tmp_path / "half.npz").state["vision.patch_embedding.bias"], values.float()
    )


def remove(*names: str) -> Callable[[dict], object]:
    return lambda content: [content.pop(f"params/{name}") for name in names]


WRONG = [
    (remove("img/MAPHead_0/probe"), "missing: img/MAPHead_0/probe"),
    (remove("txt/pos_embedding"), "missing: txt/pos_embedding"),
    (remove("img/Transformer/encoderblock/LayerNorm_1/scale"), "missing: .*encoderblock_0/LayerNorm_1/scale"),
    (
        remove("txt/Encoder_0/encoderblock/MlpBlock_0/Dense_0/kernel"),
        "missing: txt/Encoder_0/encoderblock_0/MlpBlock_0/Dense_0/kernel",
    ),
    (remove("t"), "missing: t$"),
    (lambda c: c.update({"params/img/head/kernel": np.zeros((2, 2))}), "unexpected: img/head/kernel"),
    (lambda c: c.update({"params/txt/head/kernel": np.zeros((16, 7))}), "misshapen: txt/head/kernel"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, change: Callable, message: str) -> None:
    content = small_arrays()
    change(content)
    np.savez(tmp_path / "wrong.npz", **content)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "wrong.npz")


def test_other_and_damaged_files_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match=r"other\.npz is no SigLIP model of big_vision"):
        load_model(tmp_path / "other.npz")
    np.savez(tmp_path / "whole.npz", **small_arrays())
    data = bytearray((tmp_path / "whole.npz").read_bytes())
    data[2000:2100] = bytes(100)
    (tmp_path / "damaged.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read the weights in .*damaged\.npz"):
        load_model(tmp_path / "damaged.npz")
    (tmp_path / "short.npz").write_bytes(data[:3000])
    with pytest.raises(
        UserError, match=r"short\.npz is a damaged archive, its end is missing; copy the file"
    ):
        load_model(tmp_path / "short.npz")


def test_pickles_are_refused(tmp_path: Path) -> None:
    """Whatever they are called, and in the place of a folder's weights too."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.npz")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    for name in ("weights.npz", "old.pt"):
        with pytest.raises(UserError, match=rf"{name} is a pickle"):
            load_model(tmp_path / name)
    with pytest.raises(UserError, match=r"objects\.npz.*allow_pickle=False"):
        load_model(tmp_path / "objects.npz")
    folder = tmp_path / "hf"
    shutil.copytree(golden_folder("hf_siglip_b8_i32"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load_model(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is a pickle"):
        load_model(folder)
