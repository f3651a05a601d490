"""Referring expressions: does the decoder's box of a text cover what the text means."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image, ImageDraw

from siglip_train.data.config import extensions
from siglip_train.data.remote.cache import ShardCache
from siglip_train.data.remote.locations import check_local, is_remote
from siglip_train.data.sentences import RelativeBox
from siglip_train.data.shards.index_shards import index_shards
from siglip_train.data.shards.reader import ShardReader, Wanted
from siglip_train.data.shards.select import Selection, as_selection
from siglip_train.distributed.collectives import gather_objects
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder, Evaluation
from siglip_train.evals.loader import EvaluationBatch, EvaluationSource, check_found
from siglip_train.report.thumbnail import spread, thumbnail

_LOG = logging.getLogger(__name__)
_RIGHT = 0.5
# COCO_train2014_000000123456 and 000000123456, perhaps with the number of an object behind, are one photograph
_COCO = re.compile(r"(?:^|[_/])(\d{12})(?:_\d+)?(?:_jpe?g)?$")
# of images in the report: pixels, and the colours of boxes
_SHOWN, _GREEN, _ORANGE = 192, (20, 150, 60), (240, 120, 0)


class _Answer(NamedTuple):
    """Of one text of one image, by its key. prior: the box that the decoder gives without the image."""

    place: int
    key: str
    text: str
    box: RelativeBox
    found: RelativeBox
    prior: RelativeBox


@dataclass(kw_only=True)
class Referring:
    """Accuracy of boxes at an intersection over union of 0.5, and its mean, over all texts or the first of each image.

    `prior_acc` is that of the same decoder with tokens of zeros in place of the image's: what can be had by knowing
    where boxes usually are. regions: `json:field` with a list of `{box, text}`. first_only: one text for each image.
    beams: sentences kept while searching. gallery: images kept for the report, with both boxes. trained_on: shards that
    the model was trained on; `trained_on_images` is then how many images of this set are among theirs, by key, or by
    COCO's number where keys have one, and the log warns of them. refuse_trained_on: an error in place of the warning.
    """

    task: ClassVar[str] = "referring_expressions"

    shards: str | list[str]
    regions: str = "json:regions"
    first_only: bool = False
    beams: int = 1
    gallery: int = 24
    trained_on: str | list[str] | None = None
    refuse_trained_on: bool = False
    image: str = EvaluationSource.image
    max_samples: int | None = None
    select: Selection | dict[str, Any] = field(default_factory=Selection)

    def __post_init__(self) -> None:
        """Check what makes up the source."""
        if self.beams < 1 or self.gallery < 0:
            raise ValueError("beams must be at least 1 and gallery must not be negative")
        self._source = EvaluationSource(
            shards=self.shards,
            image=self.image,
            regions=self.regions,
            max_samples=self.max_samples,
            select=as_selection(self.select),
        )

    def check(self) -> None:
        """Find the shards."""
        check_found(self._source)
        if self.trained_on is not None:
            check_local(self.trained_on)

    def run(self, encoder: Encoder) -> Evaluation:
        """Ask for the box of every text. All ranks."""
        captioner, world = encoder.captioner(), encoder.world
        known = _photographs(self.trained_on, self.image) if self.trained_on is not None else None
        loader = encoder.loader(self._source)
        mine = list[_Answer]()
        for batch, features in encoder.featured(loader):
            blind = features._replace(tokens=torch.zeros_like(features.tokens))
            for number in range(self._rounds(batch)):
                texts = [row[number].text if number < len(row) else "" for row in batch.regions]
                boxes = captioner.locate(features, texts, self.beams)
                priors = captioner.locate(blind, texts, self.beams)
                mine += [
                    _Answer(place, key, text, row[number].box, box, prior)
                    for place, key, text, row, box, prior in zip(
                        batch.index.tolist(), batch.keys, texts, batch.regions, boxes, priors, strict=True
                    )
                    if number < len(row)
                ]
        everyone = [answer for part in gather_objects(mine) for answer in part]
        all_counts = gather_objects(Counter(loader.counts))
        if not everyone:
            raise UserError(f"no sample of {self.shards} has regions in {self.regions}")
        overlaps = torch.tensor([iou(answer.box, answer.found) for answer in everyone])
        blind_overlaps = torch.tensor([iou(answer.box, answer.prior) for answer in everyone])
        metrics = {
            "acc": float((overlaps >= _RIGHT).float().mean()),
            "mean_iou": float(overlaps.mean()),
            "prior_acc": float((blind_overlaps >= _RIGHT).float().mean()),
            "n": float(len(everyone)),
        }
        if known is not None:
            metrics["trained_on_images"] = float(self._count_known(everyone, known, is_main=world.is_main))
        if not world.is_main:
            return Evaluation(metrics, {})
        chosen = [everyone[place] for place in spread(len(everyone), self.gallery)]
        shown = [_shown(loader.original(answer.place), answer) for answer in chosen]
        counts = dict(sum(all_counts, Counter()))
        return Evaluation(metrics, {"boxes": shown, "counts": counts})

    def _count_known(self, answers: Sequence[_Answer], known: set[str], *, is_main: bool) -> int:
        """How many images of this set are among the `known` ones. Raises `UserError`."""
        names = {_photograph(answer.key.partition("/")[2]) for answer in answers}
        both = names & known
        if not both:
            return 0
        line = f"{len(both)} of the {len(names)} images of {self.shards}, such as {min(both)}, are in {self.trained_on}"
        if self.refuse_trained_on:
            raise UserError(
                f"{line}, which the model was trained on; measure others, or set refuse_trained_on=false"
            )
        if is_main:
            _LOG.warning("%s, which the model was trained on: the accuracy is not that on new images", line)
        return len(both)

    def _rounds(self, batch: EvaluationBatch) -> int:
        """Texts of an image that are asked for, as many on every rank."""
        most = max(len(row) for row in batch.regions)
        return max(min(each, 1) if self.first_only else each for each in gather_objects(most))


def _photographs(shards: str | list[str], image: str) -> set[str]:
    """The photographs of a training set, by key or COCO's number. All ranks. Raises `UserError` for remote ones."""
    (found,) = index_shards([shards], [Wanted(extensions(image))], ShardCache.at(None))
    if found.has_copies or any(map(is_remote, found.urls)):
        raise UserError(f"trained_on={shards}: keys are read of shards on this machine, and these are remote")
    reader = ShardReader(found)
    return {_photograph(reader.key(*found.locate(place))) for place in range(len(found))}


def _photograph(key: str) -> str:
    number = _COCO.search(key)
    return number[1] if number else key


def _shown(image: Image.Image, answer: _Answer) -> dict[str, Any]:
    """The image with the right box in green and the decoder's in orange, for the report."""
    image = image.convert("RGB").resize((_SHOWN, round(_SHOWN * image.height / image.width)))
    draw = ImageDraw.Draw(image)
    for box, color in ((answer.box, _GREEN), (answer.found, _ORANGE)):
        edges = [edge * size for edge, size in zip(box, 2 * image.size, strict=True)]
        draw.rectangle(edges, outline=color, width=3)
    overlap = iou(answer.box, answer.found)
    return {
        "picture": thumbnail(image, _SHOWN),
        "text": answer.text,
        "overlap": overlap,
        "is_right": overlap >= _RIGHT,
    }


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    inner = max(0.0, wide) * max(0.0, high)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return inner / (sum(areas) - inner)
