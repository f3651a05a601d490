"""Tokenizers and the captions of shards: what one is trained on, and how well it serves each language."""
