"""A folder of a tiny OWLv2 or OWL-ViT with random weights, as transformers saves a real one."""

import json
from pathlib import Path

import torch


def save_owl(folder: Path, kind: str = "owlv2", seed: int = 0) -> Path:
    """Sides of 32 pixels in patches of 8; the tokenizer is CLIP's, of letters alone."""
    import transformers

    prefix = {"owlv2": "Owlv2", "owlvit": "OwlViT"}[kind]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [".", "'"]
    pieces = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: place for place, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="!"
    )
    tokenizer.save_pretrained(folder)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = getattr(transformers, f"{prefix}Config")(
        text_config={
            **layers,
            "vocab_size": len(pieces),
            "max_position_embeddings": 48,
            "bos_token_id": len(pieces) - 2,
            "eos_token_id": len(pieces) - 1,
        },
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForObjectDetection")(config)
    with torch.no_grad():
        # so that boxes and scores differ from patch to patch and from text to text
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.7)
    model.save_pretrained(folder)
    processor = getattr(transformers, f"{prefix}ImageProcessor")(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder
