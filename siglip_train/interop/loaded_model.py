"""A model with what it needs to take images and texts: what `load_model` gives, and a person works with."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from siglip_train.batch import Images
from siglip_train.data.image_file import decode, to_rgb
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.prompts import fill, read_class_names, read_templates
from siglip_train.data.sentences import RelativeBox
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import SampleError, UserError
from siglip_train.interop.decoders import captioner_of
from siglip_train.models.siglip import Siglip, class_embeddings
from siglip_train.models.vision import VisionFeatures
from siglip_train.objectives.captioner import Captioner

T = TypeVar("T")
ImageLike = Image.Image | str | os.PathLike[str]
ImagesLike = ImageLike | Iterable[ImageLike]

# batches of decoded images that wait for the model: enough that it never waits for one slow file
_BATCHES_AHEAD = 2
# decoding many more at once keeps nothing busy but the memory
_MOST_THREADS = 16


@dataclass(frozen=True)
class LoadedModel:
    """A model with what it needs to take images and texts.

    An image is one of Pillow's, of any size and mode, or the path of a file. What the methods `embed_*` and `zero_shot`
    give is fp32, on the CPU and in the order of what they were given, one row each; a bar shows the progress of long
    work on a terminal, unless `progress` is False. NaFlex models too get square images, at the size of their position
    table.

    tokenizer: None if the folder has none; `tokenize` then says so. precision: of the towers in `embed_*`; `bf16` is
    autocast.
    """

    model: Siglip
    transform: ImageTransform
    tokenizer: Tokenizer | None
    source: Path
    precision: Literal["bf16", "fp32"] = "fp32"

    def preprocess(self, images: ImagesLike) -> Images:
        """One image or n of them, as `model.encode_image` takes them: patches uint8 `[n, L, P]`.

        Raises `UserError` that names a file which is not there or is no image.
        """
        return self.transform.batch([self._patches(image) for image in _listed(images)])

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """One text or n of them to int64 `[n, context_length]`, as `model.encode_text` takes them."""
        if self.tokenizer is None:
            raise UserError(f"{self.source} has no tokenizer: give one with tokenizer=PATH")
        tokens = self.tokenizer([texts] if isinstance(texts, str) else texts)
        vocab_size = self.model.config.text.vocab_size
        if tokens.numel() and int(tokens.max()) >= vocab_size:
            raise UserError(
                f"the tokenizer {self.tokenizer.name} gives token {int(tokens.max())}, but the model in "
                f"{self.source} has {vocab_size} tokens: this is not its tokenizer"
            )
        return tokens

    def embed_images(self, images: ImagesLike, *, batch_size: int = 64, progress: bool = True) -> Tensor:
        """Embed images: `[n, E]` of unit norm. Files are read and decoded by threads while the model works.

        Raises `UserError` as `preprocess` does.
        """
        images = _listed(images)
        rows = []
        with _bar("embedding images", len(images), is_wanted=progress) as advance, self._inference():
            for patches in _batched(self._decoded(images, _BATCHES_AHEAD * batch_size), batch_size):
                rows.append(self.model.encode_image(self.transform.batch(patches)).cpu())
                advance(len(patches))
        return torch.cat(rows) if rows else self._nothing()

    def embed_texts(
        self, texts: str | Iterable[str], *, batch_size: int = 256, progress: bool = True
    ) -> Tensor:
        """Embed texts: `[n, E]` of unit norm."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = []
        with _bar("embedding texts", len(texts), is_wanted=progress) as advance, self._inference():
            for batch in _batched(texts, batch_size):
                rows.append(self.model.encode_text(self.tokenize(batch)).cpu())
                advance(len(batch))
        return torch.cat(rows) if rows else self._nothing()

    def zero_shot(
        self,
        images: ImagesLike,
        labels: str | Sequence[str],
        *,
        templates: str | Sequence[str] = ("{}",),
        batch_size: int = 64,
        progress: bool = True,
    ) -> Tensor:
        """Probability that an image and a label belong together, each pair by itself: `[n, labels]`, 0 to 1.

        It is sigmoid(scale * cosine + bias) with the model's own scale and bias (SigLIP, section 3.2), so that the row
        of an image need not add up to 1; the largest is the class it belongs to. labels: class names or whole texts;
        or a file with one a line, or "imagenet". templates: texts with one place `{}` for the label, whose embeddings
        are averaged as `siglip-eval` does it; or a file with one a line, or "openai" for CLIP's 80.
        Raises `UserError` as `preprocess` does, and for labels or templates that are empty.
        """
        names, forms = read_class_names(labels), read_templates(templates)
        prompts = [fill(form, name) for name in names for form in forms]
        texts = self.embed_texts(prompts, progress=progress).unflatten(
            0, (len(names), len(forms))
        )  # [C, T, E]
        cosines = (
            self.embed_images(images, batch_size=batch_size, progress=progress) @ class_embeddings(texts).T
        )
        scale, bias = self.model.logit_scale.detach().cpu().exp(), self.model.logit_bias.detach().cpu()
        return torch.sigmoid(scale * cosines + bias)

    def caption(self, images: ImagesLike, *, beams: int = 1, batch_size: int = 64) -> list[str]:
        """What the decoder says of each image. beams: sentences kept while searching, 1 = greedy.

        Raises `UserError` for a model without a decoder, and as `preprocess` does.
        """
        said = list[str]()
        with self._inference():
            for batch in _batched(_listed(images), batch_size):
                said += self.captioner.caption(self._features(batch), beams)
        return said

    def locate(
        self, images: ImagesLike, texts: str | Sequence[str], *, beams: int = 1, batch_size: int = 64
    ) -> list[RelativeBox]:
        """The box of what each text means, in the image of the same place: (left, top, right, bottom), 0 to 1.

        Raises `UserError` as `caption` does, and where there are not as many texts as images.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self._said_of(
            images, texts, batch_size, lambda seen, asked: self.captioner.locate(seen, asked, beams)
        )

    def describe(
        self, images: ImagesLike, boxes: Sequence[RelativeBox], *, beams: int = 1, batch_size: int = 64
    ) -> list[str]:
        """What the box of the same place shows in each image: (left, top, right, bottom), 0 to 1.

        Raises `UserError` as `locate` does, and for boxes that are none.
        """
        for box in boxes:
            if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                raise UserError(
                    f"a box is (left, top, right, bottom), shares 0..1 of width and height, not {box}"
                )
        return self._said_of(
            images, boxes, batch_size, lambda seen, asked: self.captioner.describe(seen, asked, beams)
        )

    @cached_property
    def captioner(self) -> Captioner:
        """The decoder, read when it is first asked for. Raises `UserError` where there is none."""
        return captioner_of(self.source, self.model, self.tokenizer)

    def _said_of(
        self,
        images: ImagesLike,
        given: Sequence[Any],
        batch_size: int,
        answer: Callable[[VisionFeatures, list[Any]], list[T]],
    ) -> list[T]:
        images = _listed(images)
        if len(images) != len(given):
            raise UserError(
                f"there are {len(images)} images and {len(given)} texts or boxes: one for each image"
            )
        said = list[T]()
        with self._inference():
            for batch in _batched(list(zip(images, given, strict=True)), batch_size):
                said += answer(self._features([image for image, _ in batch]), [each for _, each in batch])
        return said

    def _features(self, images: Sequence[ImageLike]) -> VisionFeatures:
        device = self.model.logit_scale.device
        moved = (None if part is None else part.to(device) for part in self.preprocess(list(images)))
        return self.model.vision(*moved)

    def _patches(self, image: ImageLike) -> NDArray:
        """uint8 `[L, P]`."""
        return self.transform(_opened(image))

    def _decoded(self, images: list[ImageLike], ahead: int) -> Iterator[NDArray]:
        """The patches of every image in order, at most `ahead` of them made before they are asked for."""
        threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        waiting: deque[Future[NDArray]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            try:
                for image in images:
                    # one of Pillow's may stand here twice, and must not be decoded by two threads at once
                    ready = _opened(image) if isinstance(image, Image.Image) else image
                    waiting.append(pool.submit(self._patches, ready))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        device_type = self.model.logit_scale.device.type
        # not inference_mode, whose results cannot be used to train a probe on
        with (
            torch.no_grad(),
            torch.autocast(device_type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            yield

    def _nothing(self) -> Tensor:
        return torch.empty(0, self.model.config.vision.width)


def _listed(images: ImagesLike) -> list[ImageLike]:
    return [images] if isinstance(images, (Image.Image, str, os.PathLike)) else list(images)


def _opened(image: ImageLike) -> Image.Image:
    """In RGB. Raises `UserError`."""
    if isinstance(image, Image.Image):
        try:
            rgb = to_rgb(image)
            # what is RGB already is returned as it is, perhaps still closed
            rgb.load()
            return rgb
        except (OSError, SyntaxError) as error:  # of an image that Pillow opened and now has to read
            name = getattr(image, "filename", "") or repr(image)
            raise UserError(f"cannot read the image {name}: {error}") from error
    if not isinstance(image, (str, os.PathLike)):
        raise UserError(
            f"an image is one of Pillow's or the path of a file, not {type(image).__name__}; "
            "Image.fromarray(array) makes one of a uint8 array [H, W, 3]"
        )
    try:
        return decode(Path(image).expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the image {image}: {error.strerror}") from error
    except SampleError as error:
        raise UserError(f"cannot read the image {image}: {error}") from error


def _batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    if size < 1:
        raise UserError(f"batch_size is {size}, but must be at least 1")
    rest = iter(values)
    while batch := list(islice(rest, size)):
        yield batch


@contextmanager
def _bar(doing: str, total: int, *, is_wanted: bool) -> Iterator[Callable[[int], None]]:
    """Give `advance(count)`; nothing is shown where nobody looks: off a terminal or a notebook."""
    console = Console(stderr=True)
    if not (is_wanted and (console.is_terminal or console.is_jupyter)):
        # a disabled bar of rich 13 ends with an empty line
        yield lambda _: None
        return
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(doing, total=total)
        yield lambda count: bars.advance(bar, count)
