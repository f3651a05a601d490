"""What both sides of a conversion are asked, a few images and captions, and how far their answers may differ."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from siglip_train.batch import Batch, Images
from siglip_train.data.image_file import decode
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.tokenizer import Tokenizer
from siglip_train.errors import SampleError, UserError
from siglip_train.models.siglip import Siglip, SiglipConfig
from siglip_train.objectives.classification import Classification
from siglip_train.objectives.forward_pass import ForwardPass

# between faithful fp32 implementations 3e-7; another GELU moves embeddings by 5e-5
EMBEDDING_LIMIT = 2e-5
_MOST_IMAGES = 16
_SIZES = ((320, 240), (97, 131), (224, 224), (500, 90))
TEXTS = (
    "a photo of a cat",
    "Two dogs, one ball: a QUIET morning!",
    "ein roter Kreis über einem blauen Quadrat",
    "красный круг слева от синего квадрата",
    "青い四角の上の赤い丸",
    "दो हरे तारे",
    "دائرة حمراء فوق مربع أزرق",
    "a very long caption that goes on and on about the sky and the sea and the sand " * 4,
)


class Probe(NamedTuple):
    """Images as both sides take them, and texts as tokens.

    originals: RGB images. images: uint8 patches of the squared images. pixels: `[n, 3, S, S]` in -1..1, the same.
    tokens: `[m, context_length]`, of `texts`, or random where the model has no tokenizer and `texts` is empty.
    """

    originals: list[Image.Image]
    images: Images
    pixels: Tensor
    texts: list[str]
    tokens: Tensor


# what a side makes of a probe: the unit-norm image_embedding [n, E] and text_embedding [m, E], or logits [n, C]
Answers = dict[str, Tensor]


def make_probe(
    config: SiglipConfig, transform: ImageTransform, tokenizer: Tokenizer | None, folder: Path | None
) -> Probe:
    """Images of `folder`, or drawn ones, and captions in several languages."""
    originals = _read_images(folder) if folder else [_drawn(*size) for size in _SIZES]
    squares = [
        torch.frombuffer(bytearray(transform.resized(each).tobytes()), dtype=torch.uint8)
        for each in originals
    ]
    side = transform.image_size
    pixels = torch.stack(squares).reshape(-1, side, side, 3).permute(0, 3, 1, 2) / 127.5 - 1
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        shape = (len(TEXTS), config.text.context_length)
        tokens, texts = torch.randint(config.text.vocab_size, shape, generator=generator), []
    else:
        tokens, texts = tokenizer(TEXTS), list(TEXTS)
    images = transform.batch([transform(each) for each in originals])
    return Probe(originals, images, pixels.contiguous(), texts, tokens)


@torch.inference_mode()
def our_answers(model: Siglip, probe: Probe, head: Classification | None = None) -> Answers:
    """The probe's embeddings by our own model, or what `head` says of its images."""
    if head is not None:
        return {"logits": head.logits(ForwardPass(model, Batch({"images": probe.images})))}
    return {
        "image_embedding": model.encode_image(probe.images),
        "text_embedding": model.encode_text(probe.tokens),
    }


def differences(ours: Answers, theirs: Answers) -> dict[str, float]:
    """Largest absolute difference in any number, by kind of answer; `theirs` may lack the text."""
    return {name: _largest(ours[name].float().cpu() - theirs[name].float().cpu()) for name in theirs}


def check(found: dict[str, float], ours: Answers, whose: str) -> None:
    """Raise a `UserError` where answers differ by more than rounding can explain."""
    for name, difference in found.items():
        # logits, unlike embeddings, have any size, and rounding grows with it
        limit = EMBEDDING_LIMIT * max(1.0, _largest(ours[name]))
        # NaN too is too much
        if not difference <= limit:
            raise UserError(
                f"{name} of {whose} differs from ours by {difference:.1e}, more than {limit:.0e}; "
                "nothing was written"
            )


def _largest(numbers: Tensor) -> float:
    return numbers.abs().max().item()


def _read_images(folder: Path) -> list[Image.Image]:
    images = []
    for path in sorted(folder.iterdir() if folder.is_dir() else [folder]):
        try:
            images.append(decode(path.read_bytes()))
        except (SampleError, OSError):
            continue
        if len(images) == _MOST_IMAGES:
            break
    if not images:
        raise UserError(f"--pictures: no image can be read from {folder}")
    return images


def _drawn(width: int, height: int) -> Image.Image:
    """A gradient with shapes on it: smooth parts, edges and every colour channel."""
    ramp = Image.linear_gradient("L").resize((width, height))
    image = Image.merge(
        "RGB", (ramp, ramp.rotate(90).resize(ramp.size), ramp.transpose(Image.Transpose.ROTATE_180))
    )
    draw = ImageDraw.Draw(image)
    for number in range(12):
        x, y = (0.5 + 0.4 * math.sin(number)) * width, (0.5 + 0.4 * math.cos(number * 1.7)) * height
        size = 0.08 * (1 + number % 3) * min(width, height)
        draw_shape = draw.ellipse if number % 2 else draw.rectangle
        draw_shape(
            (x - size, y - size, x + size, y + size), fill=(number * 20, 255 - number * 15, number * 37 % 256)
        )
    return image
