"""The inputs of a loader in tests: what the sources say, as if objectives had asked for all of it."""

from siglip_train.data.config import DataConfig
from siglip_train.data.image_transform import ImageTransform
from siglip_train.data.inputs.base import Input, RunInputs
from siglip_train.data.inputs.captions import CaptionInput
from siglip_train.data.inputs.images import ImageInput
from siglip_train.data.inputs.labels import LabelInput
from siglip_train.data.tokenizer import Tokenizer


def inputs_of(config: DataConfig, transform: ImageTransform, tokenizer: Tokenizer | None) -> RunInputs:
    """Captions and labels where the sources say where they are, and images."""
    sources = config.sources.values()
    kinds: list[type[Input]] = []
    if any(source.text is not None for source in sources):
        kinds.append(CaptionInput)
    if any(source.label is not None for source in sources):
        kinds.append(LabelInput)
    return RunInputs((*kinds, ImageInput), transform, tokenizer)
