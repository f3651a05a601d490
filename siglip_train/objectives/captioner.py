"""What a trained decoder says of images, in words and boxes: captions, boxes of expressions, texts of boxes."""

from collections.abc import Callable, Sequence
from typing import Literal

from siglip_train.data.sentences import RelativeBox, SentenceForm
from siglip_train.models.decoder import Decoder
from siglip_train.models.generation import Search, generate
from siglip_train.models.vision import VisionFeatures


class Captioner:
    """A decoder with the form of its sentences.

    goes_on: as in `Search`, for several ranks.
    """

    def __init__(self, decoder: Decoder, form: SentenceForm, goes_on: Callable[[bool], bool] = bool) -> None:
        self.decoder, self.form, self.goes_on = decoder, form, goes_on

    def on_ranks(self, any_rank: Callable[[bool], bool]) -> "Captioner":
        """The same for ranks that must decode equally many tokens together; any_rank: whether one of them says so."""
        return Captioner(self.decoder, self.form, any_rank)

    def caption(self, images: VisionFeatures, beams: int = 1) -> list[str]:
        """A caption of each of B images, as the vision tower gives them."""
        return self._texts("cap", images, [None] * len(images.tokens), beams)

    def describe(self, images: VisionFeatures, boxes: Sequence[RelativeBox], beams: int = 1) -> list[str]:
        """What one box of each image shows."""
        return self._texts("gcap", images, boxes, beams)

    def locate(self, images: VisionFeatures, texts: Sequence[str], beams: int = 1) -> list[RelativeBox]:
        """The box of what a text means, one text for each image: left, top, right, bottom, as shares of the image."""
        search = self._search("arf", beams)._replace(may_follow=self.form.box_continuations)
        prompts = [self.form.prompt("arf", text) for text in texts]
        found = generate(self.decoder, images.tokens, prompts, search, images.mask)
        boxes = [self.form.box_of(each.tokens) for each in found]
        assert None not in boxes, "the form leaves no other end, and a prompt leaves room for a box"
        return boxes  # type: ignore[return-value]

    def _texts(
        self,
        task: Literal["cap", "gcap"],
        images: VisionFeatures,
        given: Sequence[RelativeBox | None],
        beams: int,
    ) -> list[str]:
        prompts = [self.form.prompt(task, each) for each in given]
        found = generate(self.decoder, images.tokens, prompts, self._search(task, beams), images.mask)
        return [self.form.tokenizer.decode(each.tokens) for each in found]

    def _search(self, task: Literal["cap", "arf", "gcap"], beams: int) -> Search:
        tokenizer = self.form.tokenizer
        shared = len(self.form.prefixes[task])
        return Search(tokenizer.eos_id, tokenizer.pad_id, shared, beams, goes_on=self.goes_on)
