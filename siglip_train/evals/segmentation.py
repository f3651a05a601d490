"""How much of an image its patch tokens know: classes of pixels told by a linear layer, trained on a frozen tower."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.shards.select import as_selection
from siglip_train.distributed.collectives import add_over_ranks, gather_objects
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder, Evaluation
from siglip_train.evals.loader import EvaluationSource, check_found
from siglip_train.evals.patch_classifier import PatchClassifier, Patches, trained
from siglip_train.models.vision import VisionFeatures
from siglip_train.report.palette import coloured
from siglip_train.report.thumbnail import spread, thumbnail

# an 8-bit map has so many classes
_CLASSES = 256
# of images in the report: pixels of each of the three beside one another, and between them
_SHOWN, _GAP = 128, 4


class _Read(NamedTuple):
    """Of this rank's training images. labels: uint8 `[n, p * p]`, the class of each pixel under each of n patches."""

    tokens: Tensor  # [n, D]
    labels: Tensor
    held_out: Tensor  # [n]
    keys: list[str]


class _Measured(NamedTuple):
    """Of the test images. confusion: int64 `[256, 256]`, pixels by class and by the class that was said."""

    confusion: Tensor
    shown: list[dict[str, Any]]
    keys: list[str]
    counts: dict[str, int]


@dataclass(kw_only=True)
class Segmentation:
    """Mean intersection over union of the classes of a test set, by a linear probe of patch tokens.

    Tokens are those after the final LayerNorm. Their logits are enlarged bilinearly to the image's own size, and those
    of overlapping crops averaged; `miou` is the mean over the classes that the test set shows, `pixel_acc` the share of
    pixels that are right. How the layer is trained: `patch_classifier.trained`.

    train, test: shards, or the fields of `EvaluationSource`: shards, image, max_samples, select. mask: the member with
    the class map. ignore: class numbers that no pixel counts of. crops: 1 squashes an image to the model's square, k
    cuts k x k overlapping ones of it at a higher resolution, in training and test. with_pooled: put the pooled output
    beside each token (SigLIP 2, section 3.3.1). l2: penalties to choose from. held_out: share of the training images
    by which one is chosen. iterations: of L-BFGS at most, for each penalty. names: a json file, {"1": "person", …}, for
    the report. gallery: images kept for it.
    """

    task: ClassVar[str] = "linear_segmentation"

    train: str | dict[str, Any]
    test: str | dict[str, Any]
    mask: str = "mask.png"
    ignore: tuple[int, ...] | list[int] = (255,)
    crops: int = 1
    with_pooled: bool = False
    l2: tuple[float, ...] | list[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    held_out: float = 0.2
    iterations: int = 100
    names: str | None = None
    gallery: int = 12

    def __post_init__(self) -> None:
        """Check ranges and the sources."""
        if not self.l2 or min(self.l2) <= 0 or not 0 < self.held_out < 1 or self.iterations < 1:
            raise ValueError("l2 must be above 0, held_out between 0 and 1, iterations at least 1")
        if self.gallery < 0 or not set(self.ignore) <= set(range(_CLASSES)):
            raise ValueError("gallery must not be negative, and ignore must be numbers of 0 to 255")
        self._train, self._test = (self._source(part) for part in (self.train, self.test))

    def _source(self, part: str | Mapping[str, Any]) -> EvaluationSource:
        values: dict[str, Any] = {"shards": part} if isinstance(part, str) else dict(part)
        select = as_selection(values.pop("select", {}))
        return EvaluationSource(**values, mask=self.mask, crops=self.crops, select=select)

    def check(self) -> None:
        """Find the shards of both sets, and the names."""
        check_found(self._train)
        check_found(self._test)
        self._names()

    def run(self, encoder: Encoder) -> Evaluation:
        """Train the layer, then measure it. All ranks."""
        train = self._read(encoder)
        classes = self._classes(train.labels)
        classifier = trained(_patches(train, classes), list(self.l2), iterations=self.iterations)
        test = self._measure(encoder, classifier, classes)
        self._check_apart(train.keys, test.keys)
        hits, truth, said = test.confusion.diagonal(), test.confusion.sum(1), test.confusion.sum(0)
        ious = hits / (truth + said - hits).clamp(min=1)
        metrics = {
            "miou": float(ious[truth > 0].mean()),
            "pixel_acc": float(hits.sum() / truth.sum().clamp(min=1)),
            "l2": classifier.l2,
            "n": float(len(test.keys)),
        }
        if not encoder.world.is_main:
            return Evaluation(metrics, {})
        names = self._names()
        by_class = [
            {"name": names.get(number, str(number)), "iou": float(ious[number]), "pixels": int(truth[number])}
            for number in truth.nonzero().flatten().tolist()
        ]
        return Evaluation(
            metrics, {"segments": test.shown, "segment_classes": by_class, "counts": test.counts}
        )

    def _read(self, encoder: Encoder) -> _Read:
        """The tokens of this rank's training images, and what lies under them. All ranks."""
        loader = encoder.loader(self._train)
        # by place in the set, so that the same images are held out on any number of ranks
        order = torch.randperm(loader.samples, generator=torch.Generator().manual_seed(0)).tolist()
        held_out = set(order[: max(1, round(self.held_out * len(order)))])
        width = encoder.model.config.vision.width * (1 + self.with_pooled)
        tokens = [torch.zeros(0, width, device=encoder.world.device)]
        labels = [torch.zeros(0, encoder.transform.patch_size**2, dtype=torch.uint8)]
        outside, keys = [torch.zeros(0, dtype=torch.bool)], list[str]()
        for batch, features in encoder.featured(loader):
            rows = self._tokens(features)  # [B, crops * crops, L, D]
            for row, place in enumerate(batch.index.tolist()):
                mask = batch.masks[row]
                if mask is not None:
                    under = _under_patches(mask, encoder.transform, self.crops)
                    tokens.append(rows[row].flatten(0, 1))
                    labels.append(under)
                    outside.append(torch.full((len(under),), place in held_out))
                    keys.append(batch.keys[row])
        if not any(gather_objects(bool(keys))):
            raise UserError(f"no usable image in {self._train.shards}; bad samples are named in the log")
        return _Read(torch.cat(tokens), torch.cat(labels), torch.cat(outside), keys)

    def _tokens(self, features: VisionFeatures) -> Tensor:
        """`[B, crops * crops, L, D]`, or twice as wide with the pooled output."""
        tokens = features.tokens.float()
        if self.with_pooled:
            pooled = features.pooled.float()[:, None].expand(-1, tokens.shape[1], -1)
            tokens = torch.cat([tokens, pooled], dim=-1)
        return tokens.unflatten(0, (-1, self.crops**2))

    def _classes(self, labels: Tensor) -> list[int]:
        """The classes that training images of any rank show. All ranks."""
        found = set().union(*gather_objects(labels.unique().tolist())) - set(self.ignore)
        if len(found) < 2:
            raise UserError(
                f"{self.mask} of {self._train.shards} shows the classes {sorted(found)} besides those that are"
                " ignored: a probe needs two"
            )
        return sorted(found)

    def _measure(self, encoder: Encoder, classifier: PatchClassifier, classes: list[int]) -> _Measured:
        """Label every pixel of the test images. All ranks."""
        loader, device = encoder.loader(self._test), encoder.world.device
        wanted = set(spread(loader.samples, self.gallery))
        numbers = torch.tensor(classes, device=device)
        confusion = torch.zeros(_CLASSES**2, dtype=torch.int64, device=device)
        shown, keys = dict[int, dict[str, Any]](), list[str]()
        for batch, features in encoder.featured(loader):
            logits = classifier.logits(self._tokens(features))  # [B, crops * crops, L, C]
            for row, place in enumerate(batch.index.tolist()):
                mask = batch.masks[row]
                if mask is None:
                    continue
                said = numbers[enlarged(logits[row], encoder.transform, mask.shape).argmax(dim=0)]  # [H, W]
                truth = torch.from_numpy(mask).long().to(device)
                counted = ~torch.isin(truth, torch.tensor(list(self.ignore), device=device))
                pairs = _CLASSES * truth[counted] + said[counted]
                confusion += torch.bincount(pairs, minlength=_CLASSES**2)
                keys.append(batch.keys[row])
                if place in wanted:
                    right = float((truth == said)[counted].double().mean()) if counted.any() else 0.0
                    picture = _beside(loader.original(place), mask, said.cpu().numpy(), set(self.ignore))
                    shown[place] = {
                        "picture": thumbnail(picture, picture.width),
                        "key": keys[-1],
                        "right": right,
                    }
        everyone = [key for part in gather_objects(keys) for key in part]
        if not everyone:
            raise UserError(f"no usable image in {self._test.shards}; bad samples are named in the log")
        pictures = {place: each for part in gather_objects(shown) for place, each in part.items()}
        counts = dict(sum(gather_objects(Counter(loader.counts)), Counter()))
        confusion = add_over_ranks(confusion).view(_CLASSES, _CLASSES).cpu()
        return _Measured(confusion, [pictures[place] for place in sorted(pictures)], everyone, counts)

    def _check_apart(self, train: list[str], test: list[str]) -> None:
        """Raise `UserError` for images in both sets. All ranks."""
        both = {key for part in gather_objects(train) for key in part} & set(test)
        if self._train.shards == self._test.shards and both:
            raise UserError(
                f"{len(both)} samples, such as {min(both)}, are in both train and test: "
                "give them other shards, or a select with held_out and part=held_out for test"
            )

    def _names(self) -> dict[int, str]:
        if self.names is None:
            return {}
        try:
            return {
                int(number): str(name) for number, name in json.loads(Path(self.names).read_text()).items()
            }
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f'names: {self.names} is no json of the form {{"1": "person"}}: {error}'
            ) from None


def _patches(train: _Read, classes: list[int]) -> Patches:
    """With the pixels of each class counted, without patches of which no pixel counts."""
    place = torch.full((_CLASSES,), len(classes))
    place[classes] = torch.arange(len(classes))
    counts = torch.zeros(len(train.labels), len(classes) + 1)
    counts.scatter_add_(1, place[train.labels.long()], torch.ones(train.labels.shape))
    counts = counts[:, :-1]
    labelled = counts.sum(dim=1) > 0
    device = train.tokens.device
    return Patches(train.tokens, counts.to(device), train.held_out.to(device)).where(labelled.to(device))


def _under_patches(mask: NDArray[np.uint8], transform: ImageTransform, crops: int) -> Tensor:
    """A class map `[H, W]`, resized and cut as its image is: uint8 `[crops * crops * L, p * p]`."""
    side, corners = transform.crop_corners(crops)
    resized = np.asarray(Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST))
    size, patch = transform.image_size, transform.patch_size
    parts = torch.from_numpy(
        np.stack([resized[top : top + size, left : left + size] for top, left in corners])
    )
    grid = size // patch
    parts = parts[:, : grid * patch, : grid * patch].unflatten(1, (grid, patch)).unflatten(3, (grid, patch))
    return parts.transpose(2, 3).reshape(-1, patch * patch)


def enlarged(logits: Tensor, transform: ImageTransform, shape: tuple[int, ...]) -> Tensor:
    """Logits of the crops of an image `[crops * crops, L, C]` to those of its pixels: `[C, H, W]`."""
    count, patch, size = len(logits), transform.patch_size, transform.image_size
    grid = size // patch
    side, corners = transform.crop_corners(round(count**0.5))
    maps = logits.transpose(1, 2).unflatten(2, (grid, grid))  # [crops * crops, C, grid, grid]
    maps = functional.interpolate(maps, scale_factor=patch, mode="bilinear")
    # pixels beyond the last whole patch
    left_over = size - grid * patch
    maps = functional.pad(maps, (0, left_over, 0, left_over), mode="replicate")
    whole, seen = maps.new_zeros(maps.shape[1], side, side), maps.new_zeros(side, side)
    for (top, left), each in zip(corners, maps, strict=True):
        whole[:, top : top + size, left : left + size] += each
        seen[top : top + size, left : left + size] += 1
    return functional.interpolate((whole / seen)[None], tuple(shape), mode="bilinear")[0]


def _beside(
    image: Image.Image, truth: NDArray[np.uint8], said: NDArray[np.int64], ignored: set[int]
) -> Image.Image:
    """The image, its classes and those that were said; grey: ignored."""
    maps = [coloured(labels.astype(np.uint8), ignored) for labels in (truth, said)]
    height = round(_SHOWN * image.height / image.width)
    row = Image.new("RGB", (3 * _SHOWN + 2 * _GAP, height), "white")
    for place, part in enumerate((image, *maps)):
        how = Image.Resampling.NEAREST if place else Image.Resampling.LANCZOS
        row.paste(part.resize((_SHOWN, height), how), (place * (_SHOWN + _GAP), 0))
    return row
