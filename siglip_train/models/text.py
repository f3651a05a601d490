"""The text tower: bidirectional over all positions, pooled at the last one, whatever token stands there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    bottleneck: None = an embedding of `width` for each token; K = of K numbers, and one matrix `[width, K]` for all, so
    that a large vocabulary takes a part of the memory (SigLIP, section 4.3: K = 96 of 768 at 250,000 tokens).
    """

    context_length: int = 64
    vocab_size: int = 32000
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    heads: int = 12
    gelu: Gelu = "tanh"
    projection: bool = True
    bottleneck: int | None = None

    def __post_init__(self) -> None:
        check_sizes("text", self)


def with_full_table(config: TextConfig, state: Mapping[str, Tensor]) -> tuple[TextConfig, dict[str, Tensor]]:
    """The same model without a bottleneck, as other libraries know it: the product of both factors as its table.

    state: of the whole model (`text.token_embedding.weight`, …), or of a part without a text tower.
    """
    full = dict(state)
    projection = full.pop("text.token_projection.weight", None)
    if projection is not None:
        narrow = full["text.token_embedding.weight"]
        full["text.token_embedding.weight"] = (narrow.double() @ projection.double().T).to(narrow.dtype)
    return replace(config, bottleneck=None), full


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
        narrow = config.bottleneck
        self.token_embedding = nn.Embedding(config.vocab_size, narrow or config.width)
        self.token_projection = nn.Linear(narrow, config.width, bias=False) if narrow else nn.Identity()
        self.position_table = nn.Parameter(torch.empty(config.context_length, config.width))
        self.encoder = Encoder(config.depth, config.width, config.mlp_dim, config.heads, config.gelu)
        self.head = nn.Linear(config.width, embedding_dim) if config.projection else nn.Identity()
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:
        """Initial values of embeddings, positions and head."""
        std = 1 / math.sqrt(self.config.width)
        nn.init.normal_(self.token_embedding.weight, std=std, generator=generator)
        if isinstance(self.token_projection, nn.Linear):
            # the product has the variance of a full table
            narrow = self.token_projection.in_features
            nn.init.normal_(self.token_projection.weight, std=1 / math.sqrt(narrow), generator=generator)
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
        embedded = self.token_projection(self.token_embedding(tokens))  # [B, L, D]
        encoded = self.encoder(embedded + self.position_table)
        return TextFeatures(encoded, self.head(encoded[:, -1]))
