"""Position resampling against jax (the truth for NaFlex), scipy (fixed resolution), and by hand."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from siglip_train.models.positions import axis_weights, resample_positions, resize_position_table
from siglip_train.models.vision import VisionConfig, VisionTower
from tests.goldens import arrays

ATOL = 1e-5  # goldens/README.md, tables of N(0, 1)


def grid_of(rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def flat(table: np.ndarray) -> Tensor:
    return torch.from_numpy(table).flatten(0, 1)


def test_every_grid_equals_jax_resize_with_antialiasing() -> None:
    tables = arrays("bv_posemb_resize", "inputs.npz")
    expected = arrays("bv_posemb_resize", "expected.npz")
    compared = 0
    for name, wanted in expected.items():
        match = re.fullmatch(r"(?:jax_resize|naflex_pos_emb_resize_l\d+)/(g\d+)/(\d+)x(\d+)(/aa)?", name)
        # the canvas of 64 x 64 gives NaN beyond its edge
        if match is None or np.isnan(wanted).any():
            continue
        rows, columns = int(match[2]), int(match[3])
        positions = resample_positions(flat(tables[match[1]]), grid_of(rows, columns)[None])
        torch.testing.assert_close(positions, flat(wanted), rtol=0, atol=ATOL, msg=name)
        compared += 1
    assert compared > 70


def test_load_time_resize_equals_scipy_zoom() -> None:
    tables = arrays("bv_posemb_resize", "inputs.npz")
    expected = arrays("bv_posemb_resize", "expected.npz")
    cases = [name for name in expected if name.startswith("vit_resample")]
    assert len(cases) == 5
    for name in cases:
        _, source, size = name.split("/")
        resized = resize_position_table(flat(tables[source]), int(size.split("x")[0]))
        torch.testing.assert_close(resized, flat(expected[name]), rtol=0, atol=ATOL, msg=name)


def test_the_tables_own_grid_is_read_unchanged() -> None:
    table = torch.randn(49, 6)
    torch.testing.assert_close(resample_positions(table, grid_of(7, 7)[None]), table, rtol=0, atol=0)
    torch.testing.assert_close(resize_position_table(table, 7), table, rtol=0, atol=1e-6)


def test_weights_of_a_shrinking_axis_by_hand() -> None:
    # 4 places to 2: triangle of half-width 2 around 0.5, cut at the edge
    weights = axis_weights(torch.tensor([0.0]), torch.tensor([2.0]), 4)
    expected = torch.tensor([[0.75, 0.75, 0.25, 0.0]]) / 1.75
    torch.testing.assert_close(weights, expected)


def test_masked_batch_equals_each_image_alone_and_padding_gets_the_first_position() -> None:
    table = torch.randn(16, 6, dtype=torch.float64)
    shapes = [(2, 3), (5, 1), (1, 6), (4, 4)]
    grid, mask = torch.zeros(4, 16, 2, dtype=torch.int64), torch.zeros(4, 16, dtype=torch.bool)
    for row, (height, width) in enumerate(shapes):
        grid[row, : height * width] = grid_of(height, width)
        mask[row, : height * width] = True
    positions = resample_positions(table, grid, mask)
    for row, (height, width) in enumerate(shapes):
        alone = resample_positions(table, grid_of(height, width)[None])
        torch.testing.assert_close(positions[row, : height * width], alone)
        torch.testing.assert_close(
            positions[row, height * width :], alone[:1].expand(16 - height * width, -1)
        )


def test_garbage_coordinates_in_padding_do_not_stretch_the_grid() -> None:
    table = torch.randn(16, 6)
    grid, mask = grid_of(2, 3)[None].clone(), torch.tensor([[True] * 4 + [False] * 2])
    clean = resample_positions(table, grid, mask)
    grid[0, 4:] = 99
    torch.testing.assert_close(resample_positions(table, grid, mask), clean, rtol=0, atol=0)


def test_stays_in_fp32_under_autocast() -> None:
    table = torch.randn(16, 6)
    grid = grid_of(3, 5)[None]
    with torch.autocast("cpu", torch.bfloat16):
        positions = resample_positions(table, grid)
    torch.testing.assert_close(positions, resample_positions(table, grid), rtol=0, atol=0)


def flax_to_ours(params: dict[str, np.ndarray], width: int) -> dict[str, Tensor]:
    """Names and layouts of a one-block vision tower of big_vision, for this test alone."""
    state = {}

    def linear(ours: str, theirs: str, *, inputs: int = width) -> None:
        state[f"{ours}.weight"] = torch.from_numpy(params[f"{theirs}/kernel"]).reshape(inputs, -1).T
        state[f"{ours}.bias"] = torch.from_numpy(params[f"{theirs}/bias"]).flatten()

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = torch.from_numpy(params[f"{theirs}/scale"])
        state[f"{ours}.bias"] = torch.from_numpy(params[f"{theirs}/bias"])

    def attention_and_mlp(ours: str, theirs: str) -> None:
        for name in ("query", "key", "value", "out"):
            linear(f"{ours}.attention.{name}", f"{theirs}/MultiHeadDotProductAttention_0/{name}")
        linear(f"{ours}.mlp.fc1", f"{theirs}/MlpBlock_0/Dense_0")
        linear(f"{ours}.mlp.fc2", f"{theirs}/MlpBlock_0/Dense_1", inputs=80)

    linear("patch_embedding", "embedding", inputs=192)
    state["position_table"] = flat(params["pos_embedding"])
    attention_and_mlp("encoder.blocks.0", "Transformer/encoderblock_0")
    norm("encoder.blocks.0.norm1", "Transformer/encoderblock_0/LayerNorm_0")
    norm("encoder.blocks.0.norm2", "Transformer/encoderblock_0/LayerNorm_1")
    norm("encoder.norm", "Transformer/encoder_norm")
    attention_and_mlp("pool", "MAPHead_0")
    norm("pool.norm", "MAPHead_0/LayerNorm_0")
    state["pool.probe"] = torch.from_numpy(params["MAPHead_0/probe"])
    return state


def test_tower_on_grids_one_column_wide_equals_big_vision() -> None:
    name = "bv_naflex_width1"
    inputs, expected = arrays(name, "inputs.npz"), arrays(name, "expected_f32.npz")
    params = arrays(name, "params.npz")
    tower = VisionTower(VisionConfig(image_size=32, patch_size=8, width=32, depth=1, mlp_dim=80, heads=4))
    prefix = "params/img/"
    vision = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
    tower.load_state_dict(flax_to_ours(vision, 32))
    grid = torch.from_numpy(np.stack([inputs["yidx"], inputs["xidx"]], axis=-1))
    mask = torch.from_numpy(inputs["pixel_attention_mask"]).bool()
    with torch.no_grad():
        features = tower(torch.from_numpy(inputs["pixel_values_garbage_pad"]), grid, mask)
    wanted = torch.from_numpy(expected["img_encoded"])
    torch.testing.assert_close(features.tokens[mask], wanted[mask], rtol=0, atol=2e-5)
    torch.testing.assert_close(
        features.pooled, torch.from_numpy(expected["img_pre_logits"]), rtol=0, atol=1.5e-5
    )


@pytest.mark.parametrize("has_mask", [False, True])
def test_gradients_reach_the_table(has_mask: bool) -> None:
    table = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    grid = grid_of(2, 5)[None]
    mask = torch.ones(1, 10, dtype=torch.bool) if has_mask else None
    assert torch.autograd.gradcheck(lambda x: resample_positions(x, grid, mask), table)


def test_load_time_conventions_equal_their_origins() -> None:
    """timm's function for open_clip, big_vision's stored results for NaFlex, HuggingFace's for its own models."""
    timm_layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    table = torch.randn(49, 6)
    for side in (4, 16):
        theirs = timm_layers.resample_abs_pos_embed(table[None], (side, side), num_prefix_tokens=0)[0]
        ours = resize_position_table(table, side, "bicubic_antialiased")
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    expected = arrays("bv_posemb_resize", "expected.npz")
    for source, tensor in arrays("bv_posemb_resize", "inputs.npz").items():
        for side in (4, 7, 16, 24):
            ours = resize_position_table(torch.from_numpy(tensor).flatten(0, 1), side, "half_pixel")
            theirs = torch.from_numpy(expected[f"jax_resize/{source}/{side}x{side}/aa"]).flatten(0, 1)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_bicubic_is_what_transformers_interpolates_with() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=6, image_size=28, patch_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.SiglipVisionModel(config)
    # one module further down in transformers 5.0
    embeddings = getattr(model, "vision_model", model).embeddings
    table = torch.randn(49, 6)
    embeddings.position_embedding.weight.data.copy_(table)
    theirs = embeddings.interpolate_pos_encoding(torch.zeros(1, 81, 6), 36, 36)[0]
    torch.testing.assert_close(resize_position_table(table, 9, "bicubic"), theirs, rtol=0, atol=1e-6)
