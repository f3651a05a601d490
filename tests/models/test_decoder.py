"""Sentences from the decoder: what is kept changes nothing, beams find the likeliest, forms hold."""

import itertools

import pytest
import torch

from siglip_train.models.decoder import Decoder, DecoderConfig
from siglip_train.models.generation import Found, Search, generate

END, PAD = 1, 0
CONFIG = DecoderConfig(
    context_length=9, vocab_size=7, width=16, depth=2, mlp_dim=24, heads=2, vision_width=20, logits="own"
)


def random_decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**vars(CONFIG), **changes})).double().eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return decoder


def random_images(count: int) -> torch.Tensor:
    return torch.randn(count, 5, CONFIG.vision_width, generator=torch.Generator().manual_seed(3)).double()


PROMPTS = [[2, 3], [2, 4, 5, 6], [2], [2, 6, 3]]
IMAGE_MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5, [True] + [False] * 4])


def uncached(
    decoder: Decoder, image: torch.Tensor, prompt: list[int], mask: torch.Tensor | None
) -> list[int]:
    """The likeliest token, again and again, each time from the beginning."""
    tokens = list(prompt)
    while len(tokens) < decoder.config.context_length:
        hidden = decoder(torch.tensor(tokens)[None, None], image[None], mask)
        token = int(decoder.logits(hidden[0, 0, -1]).argmax())
        if token == END:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_kept_changes_nothing(masked: bool) -> None:
    decoder, images = random_decoder(), random_images(4)
    mask = IMAGE_MASK if masked else None
    found = generate(decoder, images, PROMPTS, Search(END, PAD), mask)
    expected = [
        uncached(decoder, image, prompt, None if mask is None else mask[row : row + 1])
        for row, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True))
    ]
    assert [each.tokens for each in found] == expected
    assert any(expected), "nothing was said"


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_step_with_a_cache_gives_the_hidden_states_of_a_whole_sentence(count: int) -> None:
    """Also for as many images as the step has tokens."""
    decoder, images = random_decoder(), random_images(count)
    tokens = torch.randint(7, (count, 1, 8), generator=torch.Generator().manual_seed(1))
    whole, cache = decoder(tokens, images), decoder.new_cache()
    parts = [decoder(tokens[..., begin:end], images, cache=cache) for begin, end in ((0, 3), (3, 4), (4, 8))]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-10, atol=1e-12)


def score(decoder: Decoder, image: torch.Tensor, prompt: list[int], tokens: list[int]) -> float:
    """Log-likelihood of the tokens after the prompt."""
    ids = torch.tensor([*prompt, *tokens])
    hidden = decoder(ids[None, None, :-1], image[None])
    chances = torch.log_softmax(decoder.logits(hidden[0, 0]), dim=1)
    return float(chances[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]].sum())


@torch.no_grad()
def test_beams_find_the_likeliest_sentence_and_one_beam_is_greedy() -> None:
    decoder, images = random_decoder(context_length=5), random_images(2)
    prompts = [[2, 3], [2, 4]]
    wide = generate(decoder, images, prompts, Search(END, PAD, beams=7**3))
    greedy = generate(decoder, images, prompts, Search(END, PAD))
    for image, prompt, best, one in zip(images, prompts, wide, greedy, strict=True):
        every = [
            sentence
            for length in range(3)
            for sentence in map(list, itertools.product(set(range(7)) - {END}, repeat=length))
        ]
        ended = {tuple(sentence): score(decoder, image, prompt, [*sentence, END]) for sentence in every}
        cut = {
            each: score(decoder, image, prompt, list(each))
            for each in itertools.product({0, 2, 3, 4, 5, 6}, repeat=3)
        }
        expected, best_score = max({**ended, **cut}.items(), key=lambda item: item[1])
        assert tuple(best.tokens) == expected
        assert best.score == pytest.approx(best_score, abs=1e-5)
        assert one.tokens == uncached(decoder, image, prompt, None)
        assert one.score <= best.score + 1e-6


@torch.no_grad()
def test_a_form_leaves_only_its_sentences() -> None:
    decoder, images = random_decoder(), random_images(3)

    def two_of_three_or_four(written):
        return [3, 4] if len(written) < 2 else [END]

    for beams in (1, 3):
        found = generate(
            decoder, images, PROMPTS[:3], Search(END, PAD, beams=beams, may_follow=two_of_three_or_four)
        )
        assert all(len(each.tokens) == 2 and set(each.tokens) <= {3, 4} for each in found)


@torch.no_grad()
def test_a_hand_made_decoder_says_the_caption_that_it_was_made_for() -> None:
    decoder = random_decoder(depth=1)
    for parameter in decoder.parameters():
        torch.nn.init.zeros_(parameter)
    caption = [2, 5, 3, 6, 4, END]
    # position i points at the next token; nothing else has a say
    torch.nn.init.ones_(decoder.norm.weight)
    for place, token in enumerate(caption[1:]):
        decoder.position_table[place, token] = 1.0
    for token in range(7):
        decoder.logits.weight[token, token] = 1.0
    found = generate(decoder, random_images(1), [[2]], Search(END, PAD))
    assert [each.tokens for each in found] == [caption[1:-1]]
    assert isinstance(found[0], Found)
