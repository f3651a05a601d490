"""What both towers are made of: attention, MLP, pre-LN block, encoder, MAP head, and their initial values."""

import math
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from siglip_train.errors import UserError

Gelu = Literal["tanh", "erf"]

# flax's default, which every released model was trained with; torch's is 1e-5
LAYER_NORM_EPS = 1e-6

# standard deviation of a unit normal cut at two standard deviations
_CUT_NORMAL_STD = 0.87962566103423978


# far above any model: a stranger's config of a few bytes could ask for layers without end
_MOST = {"depth": 1 << 10, "image_size": 1 << 16, "patch_size": 1 << 16, "position_grid": 1 << 16}
_MOST_OTHERS = 1 << 24


def check_sizes(tower: str, config: Any) -> None:
    """Raise a `UserError` for a size of a tower's config that is out of range, and a width that heads do not divide."""
    for name, size in vars(config).items():
        if isinstance(size, int) and not isinstance(size, bool) and size < 1:
            raise UserError(f"model.{tower}: {name} must be at least 1, got {size}")
        if isinstance(size, int) and size > _MOST.get(name, _MOST_OTHERS):
            raise UserError(
                f"model.{tower}: {name} must be at most {_MOST.get(name, _MOST_OTHERS)}, got {size}"
            )
    if config.width % config.heads:
        raise UserError(f"model.{tower}: width {config.width} must be a multiple of heads {config.heads}")


@runtime_checkable
class _Initialised(Protocol):
    def init_weights(self, generator: Generator | None = None) -> None: ...


def initialize(module: nn.Module, generator: Generator | None = None) -> None:
    """Draw every parameter in `module` anew; same values as construction gives for the same random state."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, _Initialised):
            part.init_weights(generator)


def init_xavier(linear: nn.Linear, generator: Generator | None = None) -> None:
    """Uniform weights within sqrt(6 / (inputs + outputs)), zero bias."""
    nn.init.xavier_uniform_(linear.weight, generator=generator)
    nn.init.zeros_(linear.bias)


def init_lecun(linear: nn.Linear, generator: Generator | None = None) -> None:
    """Normal weights of variance 1 / inputs, cut at two standard deviations before the cut; zero bias."""
    std = 1 / math.sqrt(linear.in_features) / _CUT_NORMAL_STD
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    nn.init.zeros_(linear.bias)


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm with the epsilon of the released models."""
    return nn.LayerNorm(width, eps=LAYER_NORM_EPS)


def cast_for_products(x: Tensor) -> Tensor:
    """Under autocast, x in the dtype of products: one cast for all layers that read it, where each would make its own.

    LayerNorm gives fp32 there, and three copies of its output would be kept for the backward pass.
    """
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class Attention(nn.Module):
    """Multi-head attention with separate projections, all with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:
        """Initial values: the fan of one projection, as q, k and v are not fused."""
        for linear in (self.query, self.key, self.value, self.out):
            init_xavier(linear, generator)

    def forward(
        self, queries: Tensor, context: Tensor, mask: Tensor | None = None, *, causal: bool = False
    ) -> Tensor:
        """Read `context` `[B, K, D]` for each of `queries` `[B, Q, D]` -> `[B, Q, D]`.

        mask: bool, True = may be read: of keys `[B, K]`, or of keys for each query `[B, Q, K]`. causal: query i reads
        keys 0..i alone, of those that the mask leaves. A query that may read no key would be NaN.
        """
        is_self = context is queries
        queries = cast_for_products(queries)
        context = queries if is_self else cast_for_products(context)
        # without a mask None and the flag are passed on as they are, which keeps the fused kernels available
        if mask is not None:
            mask = spread(mask)
            if causal:
                mask = mask & mask.new_ones(queries.shape[1], context.shape[1]).tril()
        mixed = functional.scaled_dot_product_attention(
            self._split(self.query(queries)),
            self._split(self.key(context)),
            self._split(self.value(context)),
            attn_mask=mask,
            is_causal=causal and mask is None,
        )  # [B, H, Q, D / H]
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, L, D / H]


def spread(mask: Tensor) -> Tensor:
    """A mask of `Attention`, `[B, K]` or `[B, Q, K]`, as all heads read it: `[B, 1, 1 or Q, K]`."""
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last dimension."""

    def __init__(self, width: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:
        """Initial values; unlike the attention's, the biases are not quite zero."""
        for linear in (self.fc1, self.fc2):
            init_xavier(linear, generator)
            nn.init.normal_(linear.bias, std=1e-6, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    """Pre-LN transformer block."""

    def __init__(self, width: int, mlp_dim: int, heads: int, gelu: Gelu) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attention = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, mlp_dim, gelu)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, L, D]` -> `[B, L, D]`; mask as in `Attention`."""
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, mask)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A stack of blocks and the final LayerNorm.

    activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, depth: int, width: int, mlp_dim: int, heads: int, gelu: Gelu) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, mlp_dim, heads, gelu) for _ in range(depth))
        self.norm = layer_norm(width)
        self.activation_checkpointing = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, L, D]` -> `[B, L, D]`; mask as in `Attention`."""
        return self.norm(self.run_blocks(x, len(self.blocks), mask))

    def run_blocks(self, x: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
        """The first `count` blocks alone, without the final LayerNorm: `[B, L, D]` -> `[B, L, D]`."""
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        # of its own a block draws nothing, but adapters may
        is_random = recompute and any(isinstance(part, nn.Dropout) for part in self.modules())
        for block in self.blocks[:count]:
            if recompute:
                x = cast(
                    Tensor, checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=is_random)
                )
            else:
                x = block(x, mask)
        return x


class AttentionPool(nn.Module):
    """The MAP head: a learned probe attends to all tokens (Zhai et al. 2022, as in the SigLIP models).

    NOTE: no residual around the attention, no LayerNorm on the probe and none at the end: the released models
    have none.
    """

    def __init__(self, width: int, mlp_dim: int, heads: int, gelu: Gelu) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = Attention(width, heads)
        self.norm = layer_norm(width)
        self.mlp = Mlp(width, mlp_dim, gelu)
        self.init_weights()

    def init_weights(self, generator: Generator | None = None) -> None:
        """Initial value of the probe: xavier-uniform of a 1 x D matrix."""
        bound = math.sqrt(6 / (1 + self.probe.shape[-1]))
        nn.init.uniform_(self.probe, -bound, bound, generator=generator)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, L, D]` -> `[B, D]`; mask as in `Attention`."""
        # not len(tokens), which would fix the number of images in an exported graph
        pooled = self.attention(self.probe.expand(tokens.shape[0], -1, -1), tokens, mask)  # [B, 1, D]
        return (pooled + self.mlp(self.norm(pooled))).squeeze(1)
