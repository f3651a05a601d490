"""An encoder whose embeddings the test chooses: evaluators are tested apart from models and loaders."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from siglip_train.batch import Images
from siglip_train.distributed.setup import World
from siglip_train.evals.base import ImageSet
from siglip_train.evals.loader import Caption, EvaluationSource


def image_set(
    embeddings: Tensor,
    captions: list[list[Caption]],
    labels: list[int] | list[tuple[int, ...]] | None = None,
    groups: list[str] | None = None,
) -> ImageSet:
    """Give a set with flat images, the embeddings as they are; a label may be one or several."""
    return ImageSet(
        embeddings=embeddings,
        captions=captions,
        labels=None if labels is None else [(each,) if isinstance(each, int) else each for each in labels],
        keys=[f"00000.tar/{row}" for row in range(len(embeddings))],
        groups=groups or [""] * len(embeddings),
        original=lambda row: Image.new("RGB", (20, 30), (row, 0, 0)),
        counts={"seen": len(embeddings)},
    )


class FakeEncoder:
    """Gives `images` for any source, and for each text its entry in `texts`."""

    def __init__(self, images: ImageSet, texts: dict[str, Tensor], rank: int = 0) -> None:
        self.images, self.texts = images, texts
        self.world = World(rank=rank, world_size=rank + 1, local_rank=rank, device=torch.device("cpu"))
        self.source: EvaluationSource | None = None
        self.asked: list[str] = []

    def encode_texts(self, texts: list[str]) -> Tensor:
        self.asked = texts
        return torch.stack([self.texts[text] for text in texts])

    def encode_images(
        self, source: EvaluationSource, encode: Callable[[Images], Tensor] | None = None
    ) -> ImageSet:
        self.source = source
        return self.images

    def pool_images(self, images: Images) -> Tensor:
        raise AssertionError("its images are embedded already")

    def scale_and_bias(self) -> tuple[float, float]:
        return 10.0, -10.0
