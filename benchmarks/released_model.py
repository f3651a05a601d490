"""A folder as transformers writes it, with random weights, and images to adapt it to."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

COLOURS = {"red": (200, 40, 30), "green": (40, 180, 60), "blue": (30, 60, 200)}
# sizes of google/siglip2-base-patch16-256
B16 = {
    "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                      "image_size": 256, "patch_size": 16},
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                    "vocab_size": 256000, "max_position_embeddings": 64, "projection_size": 768},
}  # fmt: skip


def write_released(folder: Path, sizes: dict[str, Any]) -> Path:
    """A folder of a SigLIP 2 of fixed resolution as transformers writes it: random weights, a small tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    torch.manual_seed(0)
    transformers.SiglipModel(transformers.SiglipConfig(**sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = [f"a {name} square number {number}" for name in COLOURS for number in range(10)]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    side = sizes["vision_config"]["image_size"]
    files = {
        "tokenizer_config.json": {"tokenizer_class": "GemmaTokenizer", "eos_token": "<eos>", "pad_token": "<pad>"},
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}, "resample": 2,
            "do_resize": True, "do_rescale": True, "do_normalize": True,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def write_images(folder: Path, *, captions: bool, count: int = 32) -> Path:
    """Squares, `count` of each colour, in a folder for each, or all in one with captions beside them."""
    for number in range(count):
        for name, colour in COLOURS.items():
            place = folder if captions else folder / name
            place.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (96, 64), colour)
            image.paste((240, 240, 240), (number, number, number + 20, number + 20))
            image.save(place / f"{name}-{number}.png")
            if captions:
                (place / f"{name}-{number}.txt").write_text(f"a {name} square number {number}")
    return folder
