"""The layers against plain re-statements in float64, and their initial values against the recipe."""

import math

import pytest
import torch
from torch import Tensor, nn

from siglip_train.models.layers import Attention, AttentionPool, Block, Encoder, Mlp, init_lecun, initialize


def attention_by_hand(layer: Attention, queries: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.zeros_like(queries)
    size = queries.shape[-1] // layer.heads
    q, k, v = layer.query(queries), layer.key(context), layer.value(context)
    for b in range(len(queries)):
        for head in range(layer.heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(size)
            if mask is not None:
                scores[:, ~mask[b]] = -math.inf
            out[b, :, part] = scores.softmax(-1) @ v[b, :, part]
    return layer.out(out)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Tensor:
    return torch.tensor([[True] * 7, [True] * 4 + [False] * 3])


@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_is_the_textbooks(tokens: Tensor, mask: Tensor, is_masked: bool) -> None:
    layer = Attention(12, heads=3).double()
    nn.init.normal_(layer.query.bias)
    given = mask if is_masked else None
    torch.testing.assert_close(layer(tokens, tokens, given), attention_by_hand(layer, tokens, tokens, given))


def test_cross_attention_reads_the_context(tokens: Tensor) -> None:
    layer = Attention(12, heads=3).double()
    queries = tokens[:, :2] * 2
    torch.testing.assert_close(layer(queries, tokens), attention_by_hand(layer, queries, tokens, None))


def test_gelus_differ_as_their_names_say() -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    erf = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    for name, expected in (("tanh", tanh), ("erf", erf)):
        mlp = Mlp(1, 1, name).double()
        for linear in (mlp.fc1, mlp.fc2):
            nn.init.ones_(linear.weight)
            nn.init.zeros_(linear.bias)
        torch.testing.assert_close(mlp(x[:, None])[:, 0], expected)


def test_block_is_pre_norm(tokens: Tensor) -> None:
    block = Block(12, 20, 3, "tanh").double()
    normed = block.norm1(tokens)
    middle = tokens + block.attention(normed, normed)
    torch.testing.assert_close(block(tokens), middle + block.mlp(block.norm2(middle)))


def test_map_head_has_no_residual_around_its_attention(tokens: Tensor, mask: Tensor) -> None:
    head = AttentionPool(12, 20, 3, "tanh").double()
    attended = attention_by_hand(head.attention, head.probe.expand(2, -1, -1), tokens, mask)
    expected = attended + head.mlp(head.norm(attended))
    torch.testing.assert_close(head(tokens, mask), expected[:, 0])


def test_activation_checkpointing_recomputes_and_changes_nothing(tokens: Tensor, mask: Tensor) -> None:
    encoder = Encoder(2, 12, 20, 3, "tanh").double()
    calls = []
    encoder.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for recompute in (False, True):
        encoder.zero_grad()
        encoder.activation_checkpointing = recompute
        encoder(tokens, mask).pow(3).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    assert len(calls) == 3
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    encoder.eval()
    encoder(tokens, mask)
    assert len(calls) == 4


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_block_compiles_as_one_graph(mask: Tensor, is_masked: bool) -> None:
    torch.manual_seed(0)
    block = Block(12, 20, 3, "tanh")
    tokens, given = torch.randn(2, 7, 12), mask if is_masked else None
    expected = block(tokens, given)
    block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(block(tokens, given), expected)


def assert_uniform(weight: Tensor, bound: float) -> None:
    """Uniform within the bound: fills it, and has its standard deviation (4 sigma of the sample)."""
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(weight.numel()))


def test_initial_values_of_a_block() -> None:
    torch.manual_seed(0)
    block = Block(128, 512, 4, "tanh")
    attention, mlp = block.attention, block.mlp
    for linear in (attention.query, attention.key, attention.value, attention.out):
        # each projection by itself: the fan of a fused q, k, v would give sqrt(6 / 4D)
        assert_uniform(linear.weight, math.sqrt(6 / (128 + 128)))
        assert not linear.bias.any()
    for linear in (mlp.fc1, mlp.fc2):
        assert_uniform(linear.weight, math.sqrt(6 / (128 + 512)))
        assert linear.bias.std().item() == pytest.approx(1e-6, rel=0.3)
    for norm in (block.norm1, block.norm2):
        assert norm.weight.eq(1).all()
        assert norm.bias.eq(0).all()
        assert norm.eps == 1e-6


def test_initial_probe() -> None:
    torch.manual_seed(0)
    # 0.0883 at B size, from flax
    assert_uniform(AttentionPool(768, 8, 12, "tanh").probe, 0.08829)


def test_lecun_normal_keeps_the_variance_of_its_inputs() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(192, 512)
    init_lecun(linear)
    std = 1 / math.sqrt(192)
    assert linear.weight.std().item() == pytest.approx(std, rel=0.01)
    cut = 2 * std / 0.87962566
    assert 0.99 * cut < linear.weight.abs().max() <= cut
    assert not linear.bias.any()


def test_initialize_repeats_with_a_generator() -> None:
    first, second = (Encoder(1, 8, 16, 2, "tanh") for _ in range(2))
    for encoder in (first, second):
        initialize(encoder, torch.Generator().manual_seed(3))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def read_by_hand(attention: Attention, queries: Tensor, context: Tensor, readable: Tensor) -> Tensor:
    """Softmax attention with a `[B, Q, K]` table of what may be read, head by head."""
    heads = []
    projected = (attention.query(queries), attention.key(context), attention.value(context))
    for q, k, v in zip(*(x.chunk(attention.heads, dim=-1) for x in projected), strict=True):
        logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~readable, -torch.inf)
        heads.append(logits.softmax(dim=-1) @ v)
    return attention.out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "keys", "queries and keys"])
def test_every_kind_of_mask_is_softmax_over_what_may_be_read(kind: str, causal: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    readable = torch.ones(3, 5, 5, dtype=torch.bool)
    if kind == "keys":
        # the first key stays, so that no query is without any
        readable &= torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()[:, None]
    if kind == "queries and keys":
        readable &= (torch.rand(3, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)
    mask = {"none": None, "keys": readable[:, 0], "queries and keys": readable}[kind]
    if causal:
        readable = readable & torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(
        attention(x, x, mask, causal=causal), read_by_hand(attention, x, x, readable), rtol=0, atol=1e-14
    )


def test_without_a_mask_the_fused_path_stays_open(monkeypatch) -> None:
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, **options):
        seen.append((options["attn_mask"], options["is_causal"]))
        return real(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    attention, x = Attention(16, 2), torch.randn(2, 4, 16)
    attention(x, x)
    attention(x, x, causal=True)
    assert seen == [(None, False), (None, True)]
