"""A model as open_clip's and CLIP_benchmark's evaluation code calls one: `(model, transform, tokenizer)`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from siglip_train.data.image_file import to_rgb
from siglip_train.interop.load import load_model
from siglip_train.interop.loaded_model import LoadedModel
from siglip_train.models.siglip import Siglip
from siglip_train.models.siglip import normalize as unit_norm
from siglip_train.models.vision import patchify


class OpenClipModel(nn.Module):
    """The calling convention of open_clip's models around one of ours."""

    def __init__(self, model: Siglip) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:  # noqa: FBT001, FBT002
        """Pixels `[B, 3, H, W]` in -1..1 -> pooled `[B, E]`, of unit norm if asked for."""
        pooled = self.model.vision(*patchify(image, self.model.config.vision.patch_size)).pooled
        return unit_norm(pooled) if normalize else pooled

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:  # noqa: FBT001, FBT002
        """Tokens `[B, context_length]` -> pooled `[B, E]`, of unit norm if asked for."""
        pooled = self.model.text(text).pooled
        return unit_norm(pooled) if normalize else pooled

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor | None]:
        """Give unit-norm features of what is there of image and text, the logit scale (not its logarithm) and bias."""
        return {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.model.logit_scale.exp(),
            "logit_bias": self.model.logit_bias,
        }


def load_clip(
    model_name: str = "siglip_train",  # noqa: ARG001
    pretrained: str | Path = "",
    cache_dir: str | None = None,  # noqa: ARG001
    device: str | torch.device = "cpu",
) -> tuple[OpenClipModel, Callable[[Image.Image], Tensor], Callable[[str | list[str]], Tensor]]:
    """Open the model at `pretrained` as CLIP_benchmark's loaders do; their other arguments are taken and not used.

    Raises UserError as `load_model` does.
    """
    return open_clip_parts(load_model(pretrained, device=device))


def register() -> None:
    """Make `siglip_train` a model type of CLIP_benchmark in this process, which must have it installed."""
    from clip_benchmark import models  # here, because it is no requirement of ours

    models.TYPE2FUNC["siglip_train"] = load_clip
    # the types it accepts are a copy made at its import
    if "siglip_train" not in models.MODEL_TYPES:
        models.MODEL_TYPES.append("siglip_train")


def open_clip_parts(
    loaded: LoadedModel,
) -> tuple[OpenClipModel, Callable[[Image.Image], Tensor], Callable[[str | list[str]], Tensor]]:
    """Give model, transform (image -> `[3, H, W]` in -1..1) and tokenizer (texts -> `[n, context_length]`)."""

    def transform(image: Image.Image) -> Tensor:
        pixels = np.array(loaded.transform.resized(to_rgb(image)))  # [H, W, 3]
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1

    def tokenize(texts: str | list[str]) -> Tensor:
        return loaded.tokenize([texts] if isinstance(texts, str) else texts)

    return OpenClipModel(loaded.model).eval(), transform, tokenize
