"""The text tower: bidirectional over all positions, pooled at the last one, whatever token stands there."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from siglip_train.errors import UserError
from siglip_train.models.layers import Encoder, Gelu, check_sizes, init_lecun


@dataclass
class TextConfig:
    """Sizes of the text tower.

    context_length: every text is padded or cut to exactly so many tokens. vocab_size: tokens that have an embedding, at
    least the tokenizer's. width: of a token. depth: transformer blocks. mlp_dim: width inside an MLP. heads: of
    attention, a divisor of `width`. gelu: as in the vision tower.
    projection: False = the pooled vector is the embedding, so `width` must equal that of the vision tower.
    """

    context_length: int = 64
    vocab_size: int = 32000
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    heads: int = 12
    gelu: Gelu = "tanh"
    projection: bool = True

    def __post_init__(self) -> None:
        check_sizes("text", self)


class TextFeatures(NamedTuple):
    """Of the text tower: tokens `[B, L, D]` after the final LayerNorm; pooled `[B, E]`, not normalised."""

    tokens: Tensor
    pooled: Tensor


class TextTower(nn.Module):
    """Text transformer without a causal and without a padding mask, as in every released SigLIP model.

    NOTE: the SigLIP 2 paper (section 2.1) describes a MAP head on the text too; the released models pool the
    last position, so a padding token for all short texts, and so does this tower.
    """

    def __init__(self, config: TextConfig, embedding_dim: int) -> None:
        super().__init__()
        if not config.projection and config.width != embedding_dim:
            raise UserError(
                f"model.text: without projection, width {config.width} must equal "
                f"model.vision.width {embedding_dim}"
            )
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_table = nn.Parameter(torch.empty(config.context_length, config.width))
        self.encoder = Encoder(config.depth, config.width, config.mlp_dim, config.heads, config.gelu)
        self.head = nn.Linear(config.width, embedding_dim) if config.projection else nn.Identity()
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:
        """Initial values of embeddings, positions and head."""
        std = 1 / math.sqrt(self.config.width)
        nn.init.normal_(self.token_embedding.weight, std=std, generator=generator)
        nn.init.normal_(self.position_table, std=std, generator=generator)
        if isinstance(self.head, nn.Linear):
            init_lecun(self.head, generator)

    def forward(self, tokens: Tensor) -> TextFeatures:
        """tokens: `[B, context_length]` int64. ValueError for other lengths: the last position is pooled."""
        if tokens.shape[1] != self.config.context_length:
            raise ValueError(
                f"texts have {tokens.shape[1]} tokens, the model takes {self.config.context_length}: "
                "tokenise with this context_length, padded to the end"
            )
        encoded = self.encoder(self.token_embedding(tokens) + self.position_table)  # [B, L, D]
        return TextFeatures(encoded, self.head(encoded[:, -1]))
