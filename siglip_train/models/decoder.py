"""The decoder of LocCa: text with boxes from an image, by cross-attention to the vision tower's tokens.

SigLIP 2, section 2.2: "a standard transformer decoder", in the shape of the text tower, with half its layers. What the
paper does not say stands in `objectives/README.md`.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kernels import linear_cross_entropy
from siglip_train.errors import UserError
from siglip_train.models.layers import Attention, Gelu, Mlp, check_sizes, init_xavier, layer_norm, spread


@dataclass
class DecoderConfig:
    """Sizes of the decoder; in a config null = as the towers say.

    context_length: tokens of the longest sentence, prefix and end included. vocab_size, width, mlp_dim, heads, gelu:
    those of the text tower. depth: half of its blocks, rounded up. vision_width: of the tokens that it reads, which
    are projected where it is not `width`. embedding: of its input tokens, its own or the text tower's. logits: a matrix
    of its own, or the embedding's (tied). parallel: whether it has an embedding for masked input.
    """

    context_length: int = 64
    vocab_size: int = 32000
    width: int = 768
    depth: int = 6
    mlp_dim: int = 3072
    heads: int = 12
    vision_width: int = 768
    gelu: Gelu = "tanh"
    embedding: Literal["own", "text_tower"] = "own"
    logits: Literal["own", "tied"] = "own"
    parallel: bool = True

    def __post_init__(self) -> None:
        check_sizes("decoder", self)
        if self.embedding not in ("own", "text_tower"):
            raise UserError(f"decoder.embedding is {self.embedding!r}: choose own or text_tower")
        if self.logits not in ("own", "tied"):
            raise UserError(f"decoder.logits is {self.logits!r}: choose own or tied")


class Kept:
    """Keys and values that an attention has made so far, `[B, H, K, D / H]`, so that they are made once."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """K."""
        return 0 if self.pair is None else self.pair[0].shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put further ones behind; return them all."""
        if self.pair is not None:
            keys, values = (
                torch.cat([old, new], dim=2) for old, new in zip(self.pair, (keys, values), strict=True)
            )
        self.pair = keys, values
        return self.pair

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order, each as often as it is named."""
        assert self.pair is not None, "nothing has been decoded"
        self.pair = self.pair[0][rows], self.pair[1][rows]


class BlockCache(NamedTuple):
    """What one block keeps while sentences grow: of their own tokens, and of the image's."""

    sentence: Kept
    image: Kept


class DecoderAttention(Attention):
    """`Attention` that can keep the keys and values of its context."""

    def step(self, queries: Tensor, context: Tensor | None, kept: Kept, mask: Tensor | None) -> Tensor:
        """Read what is kept and `context` `[B, K, D]`, which is kept from now on: `[B, Q, D]` -> `[B, Q, D]`.

        mask: as in `Attention`, of all keys, kept ones included.
        """
        if context is not None:
            kept.extend(self._split(self.key(context)), self._split(self.value(context)))
        assert kept.pair is not None, "nothing to read"
        mixed = functional.scaled_dot_product_attention(
            self._split(self.query(queries)), *kept.pair, attn_mask=None if mask is None else spread(mask)
        )  # [B, H, Q, D / H]
        return self.out(mixed.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Pre-LN self-attention, cross-attention and MLP, each with a residual around it."""

    def __init__(self, width: int, mlp_dim: int, heads: int, gelu: Gelu) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.self_attention = DecoderAttention(width, heads)
        self.norm2 = layer_norm(width)
        self.cross_attention = DecoderAttention(width, heads)
        self.norm3 = layer_norm(width)
        self.mlp = Mlp(width, mlp_dim, gelu)

    def forward(self, x: Tensor, image: Tensor, may_read: Tensor | None, image_mask: Tensor | None) -> Tensor:
        """x `[B, S, L, D]`, S sentences of an image `[B, K, D]` -> the same.

        may_read: `[B * S, L, L]` bool, None = causal.
        """
        normed = self.norm1(x).flatten(0, 1)  # [B * S, L, D]
        mixed = self.self_attention(normed, normed, may_read, causal=may_read is None)
        x = x + mixed.view_as(x)
        # the sentences of an image stand behind one another here, so that its keys and values are made once
        mixed = self.cross_attention(self.norm2(x).flatten(1, 2), image, image_mask)  # [B, S * L, D]
        x = x + mixed.view_as(x)
        return x + self.mlp(self.norm3(x))

    def step(
        self,
        x: Tensor,
        image: Tensor | None,
        may_read: Tensor | None,
        image_mask: Tensor | None,
        cache: BlockCache,
    ) -> Tensor:
        """x `[B, L, D]`, the tokens that follow those in the cache; may_read `[1, L, all]`.

        image: None where its keys and values are kept.
        """
        normed = self.norm1(x)
        x = x + self.self_attention.step(normed, normed, cache.sentence, may_read)
        x = x + self.cross_attention.step(self.norm2(x), image, cache.image, image_mask)
        return x + self.mlp(self.norm3(x))


class LogitHead(nn.Module):
    """The logits of every token of the vocabulary, `hidden weight'`: never all of them at once in training.

    A module, and the only way to its weight, because ZeRO 3 gathers what a module owns when it is called.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:  # noqa: ARG002 nothing is drawn
        """All tokens equally likely at first, as in CapPa."""
        nn.init.zeros_(self.weight)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        *,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """Logits `[..., V]` in fp32; with targets `[...]`, the sum of their cross-entropies by `token_weights`.

        Tokens of weight 0 are not multiplied. reduction: none = of each token, `[...]`, whose logits are computed
        again in the backward pass; gradients are then made there, and none is held before.
        """
        if targets is None:
            with torch.autocast(hidden.device.type, enabled=False):
                wide = torch.promote_types(hidden.dtype, torch.float32)
                return hidden.to(wide) @ self.weight.to(wide).T
        assert token_weights is not None, "targets without weights"
        loss = linear_cross_entropy(
            hidden.flatten(0, -2),
            self.weight,
            targets.flatten(),
            token_weights=token_weights.flatten(),
            reduction=reduction,
        )
        return loss if reduction == "sum" else loss.view_as(targets)


class Decoder(nn.Module):
    """Sentences about an image: causal, or in parallel, where all input is one mask embedding (CapPa, section 3).

    activation_checkpointing: recompute each block in the backward pass, as in `Encoder`.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        # a shared one is put in its place by `share`, and takes no memory until then
        device = "meta" if config.embedding == "text_tower" else None
        self.token_embedding = nn.Embedding(config.vocab_size, width, device=device)
        self.position_table = nn.Parameter(torch.empty(config.context_length, width))
        if config.parallel:
            self.mask_embedding = nn.Parameter(torch.empty(1, width))
        self.vision_projection = (
            nn.Identity() if config.vision_width == width else nn.Linear(config.vision_width, width)
        )
        self.blocks = nn.ModuleList(
            DecoderBlock(width, config.mlp_dim, config.heads, config.gelu) for _ in range(config.depth)
        )
        self.norm = layer_norm(width)
        self.logits = LogitHead(config.vocab_size if config.logits == "own" else 0, width)
        self.activation_checkpointing = False
        self.init_weights()
        if config.logits == "tied" and device is None:
            self._tie(cast(nn.Parameter, self.token_embedding.weight))

    def init_weights(self, generator: Generator | None = None) -> None:
        """Initial values of embeddings and positions: those of the text tower."""
        std = 1 / math.sqrt(self.config.width)
        if not self.token_embedding.weight.is_meta:
            nn.init.normal_(self.token_embedding.weight, std=std, generator=generator)
        nn.init.normal_(self.position_table, std=std, generator=generator)
        if self.config.parallel:
            nn.init.normal_(self.mask_embedding, std=std, generator=generator)
        if isinstance(self.vision_projection, nn.Linear):
            init_xavier(self.vision_projection, generator)

    def share(self, embedding: nn.Parameter) -> None:
        """Take the text tower's embedding `[V, D]` for its own, where the config says so. Raises `UserError`."""
        if self.config.embedding != "text_tower":
            return
        expected = (self.config.vocab_size, self.config.width)
        if embedding.shape != expected:
            raise UserError(
                f"decoder.embedding=text_tower: its table is {list(embedding.shape)} and the decoder's would be "
                f"{list(expected)}; leave decoder.width and vocab_size to the text tower, or take embedding=own"
            )
        self.token_embedding.weight = embedding
        if self.config.logits == "tied":
            self._tie(embedding)

    def _tie(self, embedding: nn.Parameter) -> None:
        # the same parameter in both modules, so that ZeRO 3 gathers it for either
        self.logits.weight = embedding

    def forward(
        self,
        tokens: Tensor,
        image: Tensor,
        image_mask: Tensor | None = None,
        parallel: Tensor | None = None,
        cache: list[BlockCache] | None = None,
    ) -> Tensor:
        """What predicts the token after each of `tokens`, `[B, S, L]` int64, S sentences of an image -> `[B, S, L, D]`.

        image: `[B, K, vision width]`, the vision tower's tokens after its final norm; image_mask `[B, K]`. parallel:
        `[B, S]` bool; there a position predicts the token of the next place from its position and the image alone.
        cache: of `new_cache()`; the tokens `[B, 1, L]` then follow those that it has seen, for which nothing is
        computed again.
        """
        start = 0 if cache is None else cache[0].sentence.length
        x = self.token_embedding(tokens)
        if parallel is not None:
            x = torch.where(parallel[..., None, None], self.mask_embedding.to(x.dtype), x)
        x = x + self.position_table[start : start + tokens.shape[-1]]  # [B, S, L, D]
        if cache is not None:
            unread = None if cache[0].image.pair is not None else self.vision_projection(image)
            return self._step(x, unread, image_mask, cache)
        image = self.vision_projection(image)
        may_read = None if parallel is None else self._may_read(parallel, tokens.shape[-1])
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x = cast(
                    Tensor,
                    checkpoint(
                        block, x, image, may_read, image_mask, use_reentrant=False, preserve_rng_state=False
                    ),
                )
            else:
                x = block(x, image, may_read, image_mask)
        return self.norm(x)

    def new_cache(self) -> list[BlockCache]:
        """For sentences that have not begun."""
        return [BlockCache(Kept(), Kept()) for _ in self.blocks]

    def _step(
        self, x: Tensor, image: Tensor | None, image_mask: Tensor | None, cache: list[BlockCache]
    ) -> Tensor:
        assert x.shape[1] == 1, "one sentence of each image grows at a time"
        start, length = cache[0].sentence.length, x.shape[2]
        may_read = None
        if length > 1:
            may_read = x.new_ones(1, length, start + length, dtype=torch.bool).tril(start)
        y = x[:, 0]
        for block, kept in zip(self.blocks, cache, strict=True):
            y = cast(DecoderBlock, block).step(y, image, may_read, image_mask, kept)
        return self.norm(y)[:, None]

    @staticmethod
    def _may_read(parallel: Tensor, length: int) -> Tensor:
        causal = torch.ones(length, length, dtype=torch.bool, device=parallel.device).tril()
        return causal | parallel.flatten()[:, None, None]  # [B * S, L, L]


def decoder_flops(config: DecoderConfig, image_tokens: int, sentences: int, counted: float) -> float:
    """Operations of forward and backward for the sentences of one image; counted: tokens of one that have logits.

    Matrix products and attention only, as in `flops_per_pair`.
    """
    width, length = config.width, sentences * config.context_length
    # four products of the sentences' own attention and two of the image's, whose other two are of the image's tokens
    block = 2.0 * length * (6 * width**2 + 2 * width * config.mlp_dim)
    block += 2.0 * image_tokens * 2 * width**2
    block += 4.0 * length * config.context_length * width + 4.0 * length * image_tokens * width
    projection = 0.0 if config.vision_width == width else 2.0 * image_tokens * config.vision_width * width
    logits = 2.0 * sentences * counted * width * config.vocab_size
    return 3.0 * (config.depth * block + projection + logits)
