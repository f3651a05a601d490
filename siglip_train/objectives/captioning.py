"""The decoder's objective: captions, expressions with their box, and boxes with their text (SigLIP 2, section 2.2).

LocCa (arXiv 2403.19596) with the parallel prediction of CapPa (arXiv 2306.07915). What the papers leave open, and what
was chosen, stands in `README.md`.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from siglip_train.batch import Batch
from siglip_train.data.inputs.base import Input
from siglip_train.data.inputs.captions import CaptionSentenceInput
from siglip_train.data.inputs.images import ImageInput
from siglip_train.data.inputs.regions import RegionInput
from siglip_train.data.sentences import Sentences
from siglip_train.errors import UserError
from siglip_train.models.decoder import Decoder, DecoderConfig, decoder_flops
from siglip_train.models.siglip import Siglip
from siglip_train.objectives.base import Objective, StepSizes
from siglip_train.objectives.forward_pass import ForwardPass
from siglip_train.typed import build

TASKS = ("cap", "arf", "gcap")
# of the operations that a step is said to take: what captions and regions have on average is known to the data alone
_COUNTED_TOKENS = 16.0


class Captioning(Objective):
    """Cross-entropy of what follows the prefix of each sentence, by a decoder over the vision tower's tokens.

    tasks: `cap` a caption, `arf` an expression and its box, `gcap` a box and its text. parallel_share: of the captions
    that are predicted in parallel. token_mean: `sentence` = the mean over the tokens of a sentence, then over the
    sentences of a task; `task` = over all tokens of a task. task_mean: whether the term is the mean of its tasks, or
    their sum. task_weights: factors of tasks beside that, 1 where none is given. logits_twice: compute logits again in
    the backward pass, a third more of their work: one gradient of the vocabulary's matrix is then alive in place of one
    for each task. decoder: keys of `DecoderConfig`.
    """

    def __init__(
        self,
        *,
        decoder: dict[str, Any],
        weight: float = 1.0,
        tasks: Sequence[str] = TASKS,
        parallel_share: float = 0.5,
        token_mean: Literal["sentence", "task"] = "sentence",
        task_mean: bool = True,
        task_weights: dict[str, float] | None = None,
        logits_twice: bool = False,
    ) -> None:
        super().__init__(weight=weight)
        if not tasks or len(set(tasks)) < len(tasks) or not set(tasks) <= set(TASKS):
            raise ValueError(f"tasks are {list(tasks)}: choose one or more of {', '.join(TASKS)}, each once")
        if not 0 <= parallel_share <= 1:
            raise ValueError(f"parallel_share is a share in 0..1, got {parallel_share}")
        if token_mean not in ("sentence", "task"):
            raise ValueError(f"token_mean is {token_mean!r}: choose sentence or task")
        factors = dict(task_weights or {})
        if not set(factors) <= set(tasks) or not all(factor >= 0 for factor in factors.values()):
            raise ValueError(f"task_weights are {factors}: give factors of at least 0 for {', '.join(tasks)}")
        self.tasks = tuple(tasks)
        share = 1 / len(tasks) if task_mean else 1.0
        self.task_weights = {task: share * factors.get(task, 1.0) for task in tasks}
        self.parallel_share = parallel_share if "cap" in tasks else 0.0
        self.token_mean = token_mean
        self.logits_twice = logits_twice
        config = build(DecoderConfig, {**decoder, "parallel": self.parallel_share > 0}, "decoder")
        self.decoder = Decoder(config)
        needs: list[type[Input]] = [CaptionSentenceInput] if "cap" in tasks else []
        needs += [RegionInput] if {"arf", "gcap"} & set(tasks) else []
        self.inputs = (*needs, ImageInput)

    def share_with(self, model: Siglip) -> None:
        """Take what is shared with the towers, and check that sizes fit. Raises `UserError`."""
        config, vision = self.decoder.config, model.config.vision
        if config.vision_width != vision.width:
            raise UserError(
                f"decoder.vision_width is {config.vision_width} and model.vision.width {vision.width}: leave it out"
            )
        if config.vocab_size < model.config.text.vocab_size:
            raise UserError(
                f"decoder.vocab_size is {config.vocab_size}, and model.text.vocab_size, of the same tokenizer, "
                f"{model.config.text.vocab_size}: set at least as many, or leave it out"
            )
        self.decoder.share(cast(nn.Parameter, model.text.token_embedding.weight))

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count this rank's sentences of each task, or their tokens."""
        counted = {task: sentences.counted for task, sentences in self._sentences(batch).items()}
        if self.token_mean == "task":
            return {task: int(each.sum()) for task, each in counted.items()}
        return {task: int(each.any(dim=1).sum()) for task, each in counted.items()}

    def flops_per_sample(self, sizes: StepSizes) -> float:
        """The decoder's; a sentence has 16 tokens that count, which is an assumption."""
        tokens = sizes.model.vision.grid**2
        return decoder_flops(self.decoder.config, tokens, len(self.tasks), _COUNTED_TOKENS)

    def forward(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        """Return the sum over this rank's sentences for each task. All tasks share one pass through the decoder."""
        sentences = self._sentences(forward_pass.batch)
        tokens = torch.stack([each.tokens for each in sentences.values()], dim=1)  # [B, S, L]
        image = forward_pass.image
        with record_function("objective/captioning"):
            hidden = self.decoder(
                tokens[..., :-1], image.tokens, image.mask, self._parallel(forward_pass.batch)
            )  # [B, S, L - 1, D]
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            weights = [
                self._token_weights(each.counted[:, 1:].to(dtype)) for each in sentences.values()
            ]  # [B, L - 1] each
            if self.logits_twice:
                losses = self.decoder.logits(
                    hidden, tokens[..., 1:], torch.stack(weights, dim=1), reduction="none"
                )  # [B, S, L - 1]
                return dict(zip(sentences, losses.sum((0, 2)).unbind(), strict=True))
            return {
                task: self.decoder.logits(hidden[:, place], tokens[:, place, 1:], weights[place])
                for place, task in enumerate(sentences)
            }

    def _sentences(self, batch: Batch) -> dict[str, Sentences]:
        return {
            task: batch.part("caption_sentences").sentences if task == "cap" else batch.part("regions")[task]
            for task in self.tasks
        }

    def _parallel(self, batch: Batch) -> Tensor | None:
        """`[B, S]`: which sentences are predicted in parallel."""
        if self.parallel_share == 0:
            return None
        drawn = batch.part("caption_sentences").draw < self.parallel_share  # [B]
        nowhere = torch.zeros_like(drawn)
        return torch.stack([drawn if task == "cap" else nowhere for task in self.tasks], dim=1)

    def _token_weights(self, counted: Tensor) -> Tensor:
        if self.token_mean == "task":
            return counted
        return counted / counted.sum(1, keepdim=True).clamp(min=1)
