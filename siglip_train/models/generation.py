"""Sentences from a decoder, token after token: greedy or by beams, free or within a form, each image its own prompt."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from siglip_train.models.decoder import Decoder

# the tokens that may follow those written since the prompt
Continuations = Callable[[Sequence[int]], Sequence[int]]


class Search(NamedTuple):
    """How sentences are found.

    end, pad: tokens; a sentence is over at the first `end`. shared: how many first tokens all prompts have in common,
    on all ranks. beams: sentences kept for each image, the best of which is returned; 1 = greedy. may_follow: None =
    every token of the vocabulary. goes_on: whether another token is wanted, of what this rank says; several ranks
    decode equally many, as ZeRO 3 gathers weights on the way.
    """

    end: int
    pad: int
    shared: int = 1
    beams: int = 1
    may_follow: Continuations | None = None
    goes_on: Callable[[bool], bool] = bool


class Found(NamedTuple):
    """One sentence: the tokens after its prompt, without the end, and the log-likelihood of them and the end."""

    tokens: list[int]
    score: float


def generate(
    decoder: Decoder,
    image: Tensor,
    prompts: Sequence[Sequence[int]],
    search: Search,
    image_mask: Tensor | None = None,
) -> list[Found]:
    """The likeliest continuation of each prompt that the search finds, up to the decoder's context length.

    image: `[B, K, vision width]`, the vision tower's tokens of each prompt's image; image_mask `[B, K]`. What has been
    decoded is kept (`BlockCache`), so that a token costs one position.
    """
    state = _State(decoder, image, prompts, search, image_mask)
    length = decoder.config.context_length
    hidden = state.read(0, search.shared)
    for place in range(search.shared, length):
        state.choose(place, decoder.logits(hidden[:, 0, -1]).float())
        if not search.goes_on(place + 1 < length and not bool(state.is_over.all())):
            break
        hidden = state.read(place, place + 1)
    return state.best()


class _State:
    """`beams` sentences of each of B prompts, B * beams rows."""

    def __init__(
        self,
        decoder: Decoder,
        image: Tensor,
        prompts: Sequence[Sequence[int]],
        search: Search,
        image_mask: Tensor | None,
    ) -> None:
        beams, device = search.beams, image.device
        self.decoder, self.search, self.prompts = decoder, search, [list(prompt) for prompt in prompts]
        self.image = image.repeat_interleave(beams, 0)
        self.image_mask = None if image_mask is None else image_mask.repeat_interleave(beams, 0)
        self.cache = decoder.new_cache()
        shape = (len(prompts) * beams, decoder.config.context_length)
        self.tokens = torch.full(shape, search.pad, dtype=torch.int64, device=device)
        for row in range(len(self.tokens)):
            prompt = self.prompts[row // beams]
            self.tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        # of the equal beams of a prompt one alone goes on at first
        self.scores = torch.full((len(prompts), beams), -torch.inf, device=device)
        self.scores[:, 0] = 0
        self.is_over = torch.zeros(len(self.tokens), dtype=torch.bool, device=device)

    def read(self, begin: int, end: int) -> Tensor:
        """Give the decoder the tokens from `begin` to `end`: `[rows, 1, end - begin, D]`."""
        return self.decoder(self.tokens[:, None, begin:end], self.image, self.image_mask, cache=self.cache)

    def choose(self, place: int, logits: Tensor) -> None:
        """Extend the best sentences by the token at `place`, of logits `[rows, V]`."""
        beams, vocabulary = self.search.beams, logits.shape[1]
        chances = torch.log_softmax(self._within_form(place, logits), dim=1)
        given = torch.tensor([len(prompt) > place for prompt in self.prompts], device=logits.device)
        given = given.repeat_interleave(beams)
        only = torch.where(given, self.tokens[:, place], self.search.pad)
        is_fixed = given | self.is_over
        fixed = torch.full_like(chances, -torch.inf).scatter_(1, only[:, None], 0.0)
        chances = torch.where(is_fixed[:, None], fixed, chances).view(-1, beams, vocabulary)
        totals = (self.scores[..., None] + chances).flatten(1)  # [B, beams * V]
        self.scores, best = totals.topk(beams, dim=1)
        first = torch.arange(len(best), device=best.device)[:, None] * beams
        rows = (first + best // vocabulary).flatten()
        chosen = (best % vocabulary).flatten()
        if beams > 1:
            self.tokens, self.is_over, given = self.tokens[rows], self.is_over[rows], given[rows]
            for kept in self.cache:
                kept.sentence.select(rows)
        self.tokens[:, place] = chosen
        self.is_over = self.is_over | (~given & (chosen == self.search.end))

    def _within_form(self, place: int, logits: Tensor) -> Tensor:
        if self.search.may_follow is None:
            return logits
        allowed = torch.full_like(logits, -torch.inf)
        # what is over, or is none of the sentences that go on, has no form
        is_open = (~self.is_over & self.scores.flatten().isfinite()).tolist()
        for row, written in enumerate(self.tokens[:, :place].tolist()):
            prompt = self.prompts[row // self.search.beams]
            is_asked = is_open[row] and place >= len(prompt)
            following = self.search.may_follow(written[len(prompt) :]) if is_asked else [self.search.end]
            allowed[row, list(following)] = 0.0
        return logits + allowed

    def best(self) -> list[Found]:
        """The first beam of each prompt."""
        found = []
        for number, prompt in enumerate(self.prompts):
            tokens = self.tokens[number * self.search.beams, len(prompt) :].tolist()
            end = tokens.index(self.search.end) if self.search.end in tokens else len(tokens)
            found.append(Found(tokens[:end], float(self.scores[number, 0])))
        return found
