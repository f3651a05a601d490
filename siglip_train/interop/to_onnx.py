"""Write both towers as ONNX graphs with unit-norm embeddings at their ends, and ask onnxruntime what it makes of them.

`vision.onnx` takes pixels, or for a NaFlex model patches with grid and mask; `text.onnx` takes tokens. The number of
images or texts is free. What does not fit a graph stands in `onnx_config.json`: how to resize, scale and bias.
"""

import importlib.util
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from siglip_train.batch import Images
from siglip_train.errors import UserError
from siglip_train.interop.native import Description
from siglip_train.interop.probe import Answers, Probe
from siglip_train.models.siglip import Siglip, SiglipConfig, normalize

VISION, TEXT, SETTINGS = "vision.onnx", "text.onnx", "onnx_config.json"
_OPSET = 20  # the first with GELU as one operator, both forms


class _Pixels(nn.Module):
    """`[B, 3, S, S]` in -1..1 to `[B, E]`."""

    def __init__(self, model: Siglip) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)


class _Patches(nn.Module):
    """Patches `[B, L, P]` in -1..1, grid `[B, L, 2]` and mask `[B, L]` to `[B, E]`."""

    def __init__(self, model: Siglip) -> None:
        super().__init__()
        self.vision = model.vision

    def forward(self, patches: Tensor, grid: Tensor, mask: Tensor) -> Tensor:
        return normalize(self.vision(patches, grid, mask).pooled)


class _Tokens(nn.Module):
    """`[B, context_length]` int64 to `[B, E]`."""

    def __init__(self, model: Siglip) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def write_onnx(folder: Path, state: Mapping[str, Tensor], description: Description) -> list[str]:
    """Write both graphs and `onnx_config.json`. Raises `UserError` where the onnx packages are not installed."""
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"--to onnx needs {' and '.join(absent)}: pip install 'siglip-train[onnx]'")
    config = description.config
    with torch.device("meta"):
        model = Siglip(config)
    model.load_state_dict(state, assign=True)
    model.eval()
    tokens = torch.zeros(2, config.text.context_length, dtype=torch.int64)
    _export(_Tokens(model), {"tokens": tokens}, folder / TEXT, axes=("batch",))
    images = _example(config)
    if config.vision.position_grid is None:
        pixels = torch.zeros(2, 3, config.vision.image_size, config.vision.image_size)
        _export(_Pixels(model), {"pixels": pixels}, folder / VISION, axes=("batch",))
    else:
        _export(_Patches(model), images._asdict(), folder / VISION, axes=("batch", "length"))
    (folder / SETTINGS).write_text(
        json.dumps(_settings(model, description), indent=2) + "\n", encoding="utf-8"
    )
    return []


def onnxruntime_answers(folder: Path, probe: Probe, config: SiglipConfig) -> Answers | None:
    """The probe's embeddings by onnxruntime on the CPU; None where it is not installed.

    One image and one text are asked alone too, as a graph may have kept the size of the batch it was made with.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    images = {"pixels": probe.pixels}
    if config.vision.position_grid is not None:
        patches, grid, _ = probe.images
        mask = torch.ones(patches.shape[:2], dtype=torch.bool)
        images = {"patches": patches / 127.5 - 1, "grid": grid, "mask": mask}
    return {
        "image_embedding": _run(folder / VISION, images),
        "text_embedding": _run(folder / TEXT, {"tokens": probe.tokens}),
    }


def _run(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    first = {name: tensor[:1].numpy() for name, tensor in inputs.items()}
    rest = {name: tensor[1:].numpy() for name, tensor in inputs.items()}
    parts = [session.run(None, part)[0] for part in (first, rest) if len(next(iter(part.values())))]
    return torch.cat([torch.from_numpy(part) for part in parts])


def _example(config: SiglipConfig) -> Images:
    """Two images of different grids, so that no length is taken for a constant."""
    lengths = (2, 3), (1, 4)
    grid = torch.zeros(2, 6, 2, dtype=torch.int64)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    for row, (height, width) in enumerate(lengths):
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        grid[row, : len(places)], mask[row, : len(places)] = places, True
    return Images(torch.zeros(2, 6, config.vision.patch_values), grid, mask)


def _export(module: nn.Module, inputs: Mapping[str, Tensor], path: Path, *, axes: Sequence[str]) -> None:
    """One graph; `axes`: names of the first dimensions of every input, which may have any size."""
    sizes = {axis: torch.export.Dim(name) for axis, name in enumerate(axes)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=["image_embedding" if path.name == VISION else "text_embedding"],
            dynamic_shapes=dict.fromkeys(inputs, sizes),
            opset_version=_OPSET,
            dynamo=True,
            external_data=True,
            verbose=False,
        )


def _settings(model: Siglip, description: Description) -> dict[str, Any]:
    vision = description.config.vision
    return {
        "image": {
            "size": vision.image_size,
            "patch_size": vision.patch_size,
            "resize": description.resize,
            "mean": 0.5,
            "std": 0.5,
            "naflex": vision.position_grid is not None,
        },
        "text": {"context_length": description.config.text.context_length},
        # logits = logit_scale * <image, text> + logit_bias
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": model.logit_bias.item(),
    }
