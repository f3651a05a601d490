"""OWLv2 and OWL-ViT of transformers, from a local folder."""

import collections
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.regions.detector import Found
from data_tools.regions.queries import TEMPLATES
from siglip_train.data.shards.reader import RawSample
from siglip_train.errors import UserError, said

# model_type of config.json -> the class
CLASSES = {"owlv2": "Owlv2ForObjectDetection", "owlvit": "OwlViTForObjectDetection"}
# texts through the text tower at once
_TEXTS_AT_ONCE = 512
# embeddings kept, some 2 kB each
_KEPT_TEXTS = 200_000


class _Prepared(NamedTuple):
    """pixels: `[3, H, W]`, float. reach: of the input, in widths and heights of the image, which may be padded."""

    pixels: Tensor
    reach: tuple[float, float]


def check_folder(folder: Path) -> str:
    """The `model_type` of a folder. Raises `UserError` for one that is no OWLv2 or OWL-ViT."""
    wanted = f"--detector takes a folder of {' or '.join(CLASSES.values())}, as transformers saves it"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no config.json that can be read; {wanted}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in CLASSES:
        raise UserError(f"{folder} is a model of another class ({kind}); {wanted}")
    if importlib.util.find_spec("transformers") is None:
        raise UserError("a detector needs transformers: pip install 'siglip-train[regions]'")
    return str(kind)


class Owl:
    """A detector that embeds each text once, as the mean over the templates, and keeps it for later images.

    embedded: how many texts have been embedded. device: where it runs; on a GPU the towers compute in bfloat16 unless
    `full_precision`, the heads in float32 always. Raises `UserError` for a folder that cannot be opened.
    """

    def __init__(self, folder: Path, device: torch.device, *, full_precision: bool = False) -> None:
        kind = check_folder(folder)
        # takes seconds, and is not installed everywhere
        import transformers

        transformers.utils.logging.disable_progress_bar()
        options = {"local_files_only": True}
        try:
            model = getattr(transformers, CLASSES[kind]).from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **options
            )
            self.processor = transformers.AutoImageProcessor.from_pretrained(folder, **options)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(f"{folder} cannot be opened by transformers: {said(error)[:300]}") from error
        self.device, self.embedded = device, 0
        self.model = model.eval().to(device)
        self.towers = getattr(self.model, kind)
        self.is_padded = kind == "owlv2" and bool(getattr(self.processor, "do_pad", True))
        self.autocast = device.type == "cuda" and not full_precision
        self._texts: collections.OrderedDict[str, Tensor] = collections.OrderedDict()

    def prepare(self, image: Image.Image, sample: RawSample) -> _Prepared:  # noqa: ARG002
        """Pixels as the model takes them."""
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        longest = max(image.size)
        reach = (longest / image.width, longest / image.height) if self.is_padded else (1.0, 1.0)
        return _Prepared(pixels, reach)

    @torch.inference_mode()
    def find(
        self, prepared: Sequence[_Prepared], texts: Sequence[Sequence[Sequence[str]]]
    ) -> list[list[Found]]:
        """The best text of each patch's box, in each list of texts. Raises `UserError` for want of memory."""
        try:
            self._embed([text for groups in texts for group in groups for text in group])
            features, boxes = self._image_features(prepared)
            found = []
            for number, groups in enumerate(texts):
                corners = boxes[number].cpu().numpy() * np.array(prepared[number].reach * 2)
                found.append([self._best(features[number], corners, group) for group in groups])
            return found
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(prepared)} images at once are too many for {self.device}: use a smaller --batch-size"
            ) from error

    def _image_features(self, prepared: Sequence[_Prepared]) -> tuple[Tensor, Tensor]:
        """`[n, P, C]` a feature for each patch, and `[n, P, 4]` its box as corners, shares of the input."""
        pixels = torch.stack([each.pixels for each in prepared]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            grid = self.model.image_embedder(pixel_values=pixels)[0]
        grid = grid.float()
        features = grid.flatten(1, 2)
        center, size = self.model.box_predictor(features, grid).split(2, dim=-1)
        return features, torch.cat([center - size / 2, center + size / 2], dim=-1)

    def _best(self, features: Tensor, corners: np.ndarray, texts: Sequence[str]) -> Found:
        queries = torch.stack([self._texts[text] for text in texts])
        logits = self.model.class_predictor(features[None], queries[None])[0][0]
        best = logits.max(dim=-1)
        return Found(corners, best.values.sigmoid().cpu().numpy(), best.indices.cpu().numpy())

    def _embed(self, texts: Sequence[str]) -> None:
        """Embed those that are new; those that were asked for longest ago are forgotten."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        step = max(1, _TEXTS_AT_ONCE // len(TEMPLATES))
        for start in range(0, len(new), step):
            part = new[start : start + step]
            self._texts.update(zip(part, self._mean_over_templates(part), strict=True))
        self.embedded += len(new)
        for text in dict.fromkeys(texts):
            self._texts.move_to_end(text)
        while len(self._texts) > max(_KEPT_TEXTS, len(texts)):
            self._texts.popitem(last=False)

    def _mean_over_templates(self, texts: Sequence[str]) -> Tensor:
        """`[n, D]` unit vectors."""
        sentences = [template.format(text) for text in texts for template in TEMPLATES]
        tokens = self.tokenizer(
            sentences,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            pooled = self.towers.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
        embeddings = torch.nn.functional.normalize(self.towers.text_projection(pooled.float()), dim=-1)
        return torch.nn.functional.normalize(embeddings.unflatten(0, (len(texts), -1)).mean(dim=1), dim=-1)
