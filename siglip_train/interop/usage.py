"""How a written model is used with the library that opens it, as code for its card; a test runs every line of it."""

from string import Template

from siglip_train.interop.open_clip import timm_name
from siglip_train.models.siglip import SiglipConfig

# of transformers' pipeline for zero-shot classification, whatever the model or its caller says
_PIPELINE_LENGTH = 64

_FEATURES = (
    "Pooled features of images, as the vision tower gives them: not of unit length, so normalise them to compare.",
    """
from transformers import ${family}VisionModel, pipeline

embed = pipeline(
    "image-feature-extraction",
    model=${family}VisionModel.from_pretrained("$name"),
    image_processor="$name",
    pool=True,
)
features = embed("image.jpg")  # [[…]]
""",
)

_MODEL = (
    "Probabilities of image-text pairs, each by itself.",
    """
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("$name")
processor = AutoProcessor.from_pretrained("$name")
texts = ["a photo of a cat", "a photo of a dog"]
inputs = processor(text=texts, images=Image.open("image.jpg"), return_tensors="pt")
output = model(**inputs)  # image_embeds, text_embeds (of unit length), logits_per_image
probabilities = output.logits_per_image.sigmoid()  # [1, 2]
""",
)

_PIPELINE = (
    "The same by a pipeline.",
    """
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", "$name")
found = classify("image.jpg", candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {}")
""",
)

_PIPELINE_OF_ANOTHER_LENGTH = (
    f"The same by a pipeline. It pads texts to {_PIPELINE_LENGTH} tokens whatever it is told, and this model takes "
    "$length, so it is given a tokenizer that knows better.",
    """
from transformers import AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("$name")
classify = pipeline(
    "zero-shot-image-classification",
    "$name",
    tokenizer=lambda texts, **options: tokenizer(texts, **(options | {"max_length": $length})),
)
found = classify("image.jpg", candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {}")
""",
)

_SENTENCE_TRANSFORMERS = (
    "Embeddings of unit length by sentence-transformers 5.4 or later.",
    """
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("$name")
images = model.encode([Image.open("image.jpg")])
texts = model.encode(["a photo of a cat", "a photo of a dog"])
cosines = model.similarity(images, texts)  # [1, 2]
""",
)

_VISION = (
    "Un-pooled tokens of any layer.",
    """
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("$name")
processor = AutoImageProcessor.from_pretrained("$name")
output = model(**processor(images=Image.open("image.jpg"), return_tensors="pt"), output_hidden_states=True)
tokens = output.hidden_states[-2]  # [B, L, D] of any layer; last_hidden_state is after the final LayerNorm
""",
)

_VISION_FEATURES = (
    _FEATURES[0],
    """
from transformers import pipeline

embed = pipeline("image-feature-extraction", "$name", pool=True)
features = embed("image.jpg")  # [[…]]
""",
)

_CLASSIFIER = (
    "Logits of the classes.",
    """
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("$name")
processor = AutoImageProcessor.from_pretrained("$name")
logits = model(**processor(images=Image.open("image.jpg"), return_tensors="pt")).logits  # [1, classes]
name = model.config.id2label[logits.argmax().item()]
""",
)

_CLASSIFIER_PIPELINE = (
    "Names and probabilities by a pipeline.",
    """
from transformers import pipeline

classify = pipeline("image-classification", "$name")
found = classify("image.jpg", top_k=3)
""",
)

_OPEN_CLIP = (
    "Zero-shot classification: the probability of each image and class by itself.",
    """
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:$name")
tokenizer = open_clip.get_tokenizer("local-dir:$name")
model.eval()
classes = open_clip.build_zero_shot_classifier(model, tokenizer, ["cat", "dog"], ["a photo of a {}", "a {}"])  # [E, 2]
with torch.no_grad():
    images = model.encode_image(preprocess(Image.open("image.jpg"))[None], normalize=True)  # [1, E]
    texts = model.encode_text(tokenizer(["a photo of a cat"]), normalize=True)  # [1, E]
    probabilities = torch.sigmoid(model.logit_scale.exp() * images @ classes + model.logit_bias)  # [1, 2]
""",
)

_OPEN_CLIP_MOVED = (
    "timm, from which open_clip takes vision towers, has no name for this size, so the folder describes its own and "
    "says where it stands. Wherever it is moved or downloaded to, tell it once:",
    """
import json
from pathlib import Path

folder = Path("$name").resolve()
config = json.loads((folder / "open_clip_config.json").read_text())
config["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{folder}/trunk"
(folder / "open_clip_config.json").write_text(json.dumps(config))
""",
)

_OPEN_CLIP_IMAGES = (
    "Embeddings of images.",
    """
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:$name")
model.eval()
with torch.no_grad():
    images = model.encode_image(preprocess(Image.open("image.jpg"))[None], normalize=True)  # [1, E]
""",
)

_ONNX_BEGIN = """
import json

import numpy as np
import onnxruntime
from PIL import Image
$import_tokenizer
settings = json.load(open("$name/onnx_config.json"))
side = settings["image"]["size"]
resize = Image.Resampling[settings["image"]["resize"].upper()]
image = Image.open("image.jpg").convert("RGB").resize((side, side), resize)
pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1  # [S, S, 3] in -1..1
vision = onnxruntime.InferenceSession("$name/vision.onnx")
"""
_ONNX_PIXELS = """images = vision.run(None, {"pixels": pixels.transpose(2, 0, 1)[None]})[0]  # [1, E], of unit length
"""
_ONNX_PATCHES = """size = settings["image"]["patch_size"]
rows = side // size  # and as many columns here; an image of any grid has this form
patches = pixels.reshape(rows, size, rows, size, 3).transpose(0, 2, 1, 3, 4).reshape(1, rows * rows, -1)  # [1, L, P]
grid = np.stack(np.divmod(np.arange(rows * rows), rows), axis=-1)[None]  # [1, L, 2]: row, column
mask = np.ones((1, rows * rows), dtype=bool)  # False is padding
images = vision.run(None, {"patches": patches, "grid": grid, "mask": mask})[0]  # [1, E], of unit length
"""
_ONNX_TEXTS = """tokenizer = Tokenizer.from_file("$name/tokenizer.json")  # cuts and pads to $length tokens
tokens = [row.ids for row in tokenizer.encode_batch(["a photo of a cat", "a photo of a dog"])]
text = onnxruntime.InferenceSession("$name/text.onnx")
texts = text.run(None, {"tokens": np.array(tokens)})[0]  # [2, E], of unit length
logits = settings["logit_scale"] * images @ texts.T + settings["logit_bias"]
probabilities = 1 / (1 + np.exp(-logits))  # [1, 2], each pair by itself
"""

_NATIVE = (
    "Embeddings, and the probability of each image and label by itself.",
    """
from siglip_train import load_model

loaded = load_model("$name", device="auto")
images = loaded.embed_images(["image.jpg"])  # [1, E], of unit length
texts = loaded.embed_texts(["a photo of a cat", "a photo of a dog"])  # [2, E]
probabilities = loaded.zero_shot(["image.jpg"], ["cat", "dog"], templates=["a photo of a {}", "a {}"])  # [1, 2]
""",
)

_NATIVE_IMAGES = (
    "Embeddings of images; for texts, a tokenizer has to be given.",
    """
from siglip_train import load_model

loaded = load_model("$name", device="auto")
images = loaded.embed_images(["image.jpg"])  # [1, E], of unit length
""",
)


def usage(form: str, config: SiglipConfig, name: str, *, has_tokenizer: bool) -> list[tuple[str, str]]:
    """Sentences, each with the Python code it announces.

    form: of `siglip-convert`, a target, or `vision` or `classifier`. name: of the folder, as the code spells it.
    The code reads `image.jpg`.
    """
    values = {
        "name": name,
        "length": str(config.text.context_length),
        "family": "Siglip" if config.vision.position_grid is None else "Siglip2",
        "import_tokenizer": "from tokenizers import Tokenizer\n" if has_tokenizer else "",
    }
    return [
        (Template(sentence).substitute(values), Template(code).substitute(values).strip())
        for sentence, code in _parts(form, config, has_tokenizer=has_tokenizer)
    ]


def _parts(form: str, config: SiglipConfig, *, has_tokenizer: bool) -> list[tuple[str, str]]:
    if form == "hf":
        is_usual = config.text.context_length == _PIPELINE_LENGTH
        pipeline = _PIPELINE if is_usual else _PIPELINE_OF_ANOTHER_LENGTH
        return [_MODEL, pipeline, _FEATURES, _SENTENCE_TRANSFORMERS] if has_tokenizer else [_FEATURES]
    if form == "onnx":
        images = _ONNX_PIXELS if config.vision.position_grid is None else _ONNX_PATCHES
        texts = _ONNX_TEXTS if has_tokenizer else ""
        return [("Embeddings without any of the training code.", _ONNX_BEGIN + images + texts)]
    if form == "open_clip":
        is_named = timm_name(config.vision) is not None
        return [
            _OPEN_CLIP if has_tokenizer else _OPEN_CLIP_IMAGES,
            *(() if is_named else (_OPEN_CLIP_MOVED,)),
        ]
    return {
        "vision": [_VISION, _VISION_FEATURES],
        "classifier": [_CLASSIFIER, _CLASSIFIER_PIPELINE],
        "native": [_NATIVE if has_tokenizer else _NATIVE_IMAGES],
    }[form]
