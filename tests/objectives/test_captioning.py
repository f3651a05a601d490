"""The decoder's objective against its formula, written out sentence by sentence in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from siglip_train.batch import Batch
from siglip_train.data.inputs.captions import CaptionSentences
from siglip_train.data.sentences import Sentences
from siglip_train.errors import UserError
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.captioning import TASKS, Captioning
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.objectives.sigmoid import SigmoidLoss
from siglip_train.objectives.training_model import TrainingModel
from tests.objectives.tiny import tiny_batch, tiny_model

LENGTH, VOCABULARY = 7, 23
SIZES = {
    "width": 16, "depth": 2, "mlp_dim": 24, "heads": 2, "vision_width": 16, "vocab_size": VOCABULARY,
    "context_length": LENGTH,
}  # fmt: skip
# of each task and sample: (tokens of the prefix, of the whole); 0 = the sample has no such sentence
EXTENTS = {
    "cap": [(2, 5), (2, 3), (2, 7), (2, 4)],
    "arf": [(1, 7), 0, (1, 4), (1, 5)],
    "gcap": [0, 0, (2, 6), 0],
}


def sentence_batch(size: int = 4) -> Batch:
    """Pairs with random sentences; every second caption is drawn to be predicted in parallel."""
    pairs, found = tiny_batch(size), {}
    for place, (task, extents) in enumerate(EXTENTS.items()):
        tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=torch.Generator().manual_seed(place))
        counted = torch.zeros(size, LENGTH, dtype=torch.bool)
        for row, extent in enumerate(extents[:size]):
            if extent:
                counted[row, slice(*extent)] = True
        found[task] = Sentences(tokens, counted)
    draw = torch.tensor([0.2, 0.8] * size)[:size]
    captions = CaptionSentences(found.pop("cap"), draw)
    return Batch({**pairs.parts, "caption_sentences": captions, "regions": found})


def drawn(**options) -> Captioning:
    """With weights that are nowhere 0."""
    decoder = {**SIZES, **options.pop("decoder", {})}
    torch.manual_seed(1)
    objective = Captioning(decoder=decoder, **options).double()
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return objective


def attend(
    weights: dict[str, Tensor], name: str, queries: Tensor, context: Tensor, may_read: Tensor
) -> Tensor:
    def linear(part: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.{part}.weight"].T + weights[f"{name}.{part}.bias"]

    q, k, v = linear("query", queries), linear("key", context), linear("value", context)
    heads, size = SIZES["heads"], SIZES["width"] // SIZES["heads"]
    mixed = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = (q[:, own] @ k[:, own].T / math.sqrt(size)).masked_fill(~may_read, -math.inf)
        mixed.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ v[:, own])
    return linear("out", torch.cat(mixed, dim=1))


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    unit = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_token_losses(
    weights: dict[str, Tensor], tokens: Tensor, image: Tensor, *, parallel: bool
) -> Tensor:
    """-log p of tokens 1.. of one sentence, `[L - 1]`."""
    inputs = weights["token_embedding.weight"][tokens[:-1]]
    if parallel:
        inputs = weights["mask_embedding"].expand_as(inputs)
    length = len(inputs)
    x = inputs + weights["position_table"][:length]
    may_read = torch.ones(length, length).bool()
    everywhere = torch.ones(length, len(image)).bool()
    for block in range(SIZES["depth"]):
        name = f"blocks.{block}"
        normed = norm(weights, f"{name}.norm1", x)
        x = x + attend(
            weights, f"{name}.self_attention", normed, normed, may_read if parallel else may_read.tril()
        )
        normed = norm(weights, f"{name}.norm2", x)
        x = x + attend(weights, f"{name}.cross_attention", normed, image, everywhere)
        hidden = norm(weights, f"{name}.norm3", x) @ weights[f"{name}.mlp.fc1.weight"].T
        hidden = functional.gelu(hidden + weights[f"{name}.mlp.fc1.bias"], approximate="tanh")
        x = x + hidden @ weights[f"{name}.mlp.fc2.weight"].T + weights[f"{name}.mlp.fc2.bias"]
    logits = norm(weights, "norm", x) @ weights["logits.weight"].T
    return logits.exp().sum(1).log() - logits[range(length), tokens[1:]]


def plain_term(model: Siglip, objective: Captioning, batch: Batch, token_mean: str = "sentence") -> Tensor:
    """The mean over tasks of the mean over sentences of the mean over tokens."""
    weights = {**dict(objective.decoder.named_parameters(remove_duplicate=False))}
    image = model.vision(*batch.part("images")).tokens
    captions = batch.part("caption_sentences")
    every = {"cap": captions.sentences, **batch.part("regions")}
    means = []
    for task in TASKS:
        by_sentence = []
        for row, extent in enumerate(EXTENTS[task][: batch.size]):
            if extent:
                parallel = task == "cap" and bool(captions.draw[row] < 0.5)
                losses = plain_token_losses(weights, every[task].tokens[row], image[row], parallel=parallel)
                by_sentence.append(losses[extent[0] - 1 : extent[1] - 1])
        if token_mean == "task":
            means.append(torch.cat(by_sentence).mean())
        else:
            means.append(torch.stack([losses.mean() for losses in by_sentence]).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("token_mean", ["sentence", "task"])
@pytest.mark.parametrize(
    ("decoder", "logits_twice"),
    [
        ({}, False),
        ({"embedding": "text_tower"}, False),
        ({"embedding": "text_tower", "logits": "tied"}, True),
    ],
)
def test_the_loss_and_its_gradients_are_those_of_the_formula(token_mean, decoder, logits_twice):
    batch = sentence_batch()
    gradients = []
    for plain in (False, True):
        model, objective = (
            tiny_model(),
            drawn(token_mean=token_mean, decoder=decoder, logits_twice=logits_twice),
        )
        whole = TrainingModel(model, {"captioning": objective})
        loss = plain_term(model, objective, batch, token_mean) if plain else whole(batch).total
        loss.backward()
        named = {name: parameter.grad for name, parameter in whole.named_parameters()}
        gradients.append((loss.item(), {name: grad for name, grad in named.items() if grad is not None}))
    (found, found_gradients), (expected, expected_gradients) = gradients
    assert found == pytest.approx(expected, rel=1e-12)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_captions_are_causal_or_parallel_each_by_its_draw_and_only_they_are():
    objective, batch = drawn(), sentence_batch()
    model = tiny_model()
    image = model.vision(*batch.part("images"))
    tokens = torch.stack(
        [batch.part("caption_sentences").sentences.tokens, batch.part("regions")["arf"].tokens], dim=1
    )
    other = tokens.clone()
    other[:, :, 3] = (other[:, :, 3] + 1) % VOCABULARY
    parallel = torch.tensor([[True, False], [False, False], [True, False], [False, False]])
    one, two = (objective.decoder(each, image.tokens, None, parallel) for each in (tokens, other))
    changed = (one != two).any(-1)  # [B, S, L]
    assert not changed[parallel].any(), "what is predicted in parallel sees no token"
    assert not changed[~parallel][:, :3].any(), "a causal position sees a later token"
    assert changed[~parallel][:, 3:].all()


def test_a_sample_without_regions_counts_for_nothing_and_the_vision_tower_runs_once():
    model, objective, batch = tiny_model(), drawn(), sentence_batch()
    runs = []
    model.vision.register_forward_hook(lambda *_: runs.append(1))
    whole = TrainingModel(model, {"sigmoid": SigmoidLoss(), "captioning": objective})
    losses = whole(batch)
    assert len(runs) == 1
    assert whole.counts(batch) == {
        "sigmoid/images": 4, "captioning/cap": 4, "captioning/arf": 3, "captioning/gcap": 1,
    }  # fmt: skip
    terms = losses.terms
    assert terms["captioning"].item() == pytest.approx(
        sum(terms[f"captioning/{task}"].item() for task in TASKS) / 3
    )
    assert losses.total.item() == pytest.approx((terms["sigmoid"] + terms["captioning"]).item())
    nothing = batch.rows(slice(1, 2))
    assert whole.counts(nothing)["captioning/gcap"] == 0
    only = TrainingModel(model, {"captioning": drawn(task_weights={"arf": 3.0})})
    alone = only(nothing)
    assert alone.terms["captioning/arf"] == 0
    assert alone.total.item() == pytest.approx(alone.terms["captioning/cap"].item() / 3)
    alone.total.backward()


def test_only_tokens_that_count_meet_the_vocabulary_and_never_all_at_once(monkeypatch: pytest.MonkeyPatch):
    model, objective, batch = tiny_model(), drawn(), sentence_batch()
    shapes = []
    from kernels.linear_cross_entropy import op

    real = op.token_gradients

    def counted(hidden, weight, bias, targets, factors, wanted):
        shapes.append(len(hidden))
        return real(hidden, weight, bias, targets, factors, wanted)

    monkeypatch.setattr(op, "token_gradients", counted)
    TrainingModel(model, {"captioning": objective})(batch).total.backward()
    assert shapes == [3 + 1 + 5 + 2, 6 + 3 + 4, 4]
    # one call for all tasks, and so one gradient of the matrix
    shapes.clear()
    loss = TrainingModel(model, {"captioning": drawn(logits_twice=True)})(batch).total
    assert not shapes, "nothing is made before the backward pass"
    loss.backward()
    assert shapes == [11 + 13 + 4]


def test_tasks_that_are_left_out_need_no_input():
    assert [kind.part for kind in drawn(tasks=["cap"]).inputs] == ["caption_sentences", "images"]
    grounded = drawn(tasks=["gcap"])
    assert [kind.part for kind in grounded.inputs] == ["regions", "images"]
    assert not hasattr(grounded.decoder, "mask_embedding"), "nothing is predicted in parallel"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tasks": ["cap", "ocr"]}, "choose one or more of cap, arf, gcap"),
        ({"parallel_share": 1.5}, "parallel_share is a share"),
        ({"token_mean": "batch"}, "choose sentence or task"),
        ({"task_weights": {"box": 1.0}}, "task_weights are"),
        ({"decoder": {"logits": "shared"}}, "decoder.logits"),
    ],
)
def test_wrong_options_are_refused(wrong, said):
    with pytest.raises((ValueError, UserError), match=said):
        drawn(**wrong)


def test_a_vocabulary_that_is_smaller_than_the_text_towers_is_refused():
    with pytest.raises(UserError, match=r"decoder.vocab_size is 20, and model.text.vocab_size, .* 23"):
        TrainingModel(tiny_model(), {"captioning": drawn(decoder={"vocab_size": 20})})


def test_a_fresh_decoder_finds_all_tokens_equally_likely():
    objective = Captioning(decoder=SIZES).double()
    losses = objective(ForwardPass(tiny_model(), sentence_batch()))
    assert losses["cap"].item() / 4 == pytest.approx(math.log(VOCABULARY))
