"""Captions: what the decoder says of images, beside what people said of them."""

import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image

from siglip_train.data.shards.select import Selection, as_selection
from siglip_train.distributed.collectives import gather_objects
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder, Evaluation
from siglip_train.evals.loader import EvaluationSource, check_found
from siglip_train.report.thumbnail import spread, thumbnail

_SCORES = ("cider", "bleu")
# a Chinese or Japanese character; a number; a word, with hyphens and apostrophes inside; any other sign
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\d+(?:[.,:]\d+)+"
    r"|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+(?:['-][^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+)*"
    r"|[^\w\s]"
)
# split off as in the Penn treebank: do n't, man 's
_ENDING = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))$")
# the marks that pycocoevalcap's tokenizer leaves out
_LEFT_OUT = frozenset("'`.?!,:-;()[]{}\"“”")


class _Answer(NamedTuple):
    """Of one image. right: by name, whether the caption is one of those accepted; blind: the same of `prior`."""

    place: int
    said: str
    prior: str
    references: tuple[str, ...]
    right: dict[str, bool]
    blind: dict[str, bool]


@dataclass(kw_only=True)
class Captions:
    """CIDEr and BLEU of generated captions, and the share that stands among those accepted, by names of one's own.

    text: member or `json:field` with people's captions, one or several. scores: `cider` and `bleu`, computed by
    pycocoevalcap's scorers; its tokenizer needs Java, so `words` takes its place. accepted: names and fields with
    captions that would be right; NAME_acc is the share that is one of them, but for case and spaces, and prior_NAME_acc
    that of the caption which the decoder gives without an image, its tokens being zeros. beams: sentences kept while
    searching. gallery: images kept for the report.
    """

    task: ClassVar[str] = "image_captioning"

    shards: str | list[str]
    text: str = "txt"
    scores: Sequence[str] = _SCORES
    accepted: Mapping[str, str] = field(default_factory=dict)
    beams: int = 1
    gallery: int = 24
    image: str = EvaluationSource.image
    max_samples: int | None = None
    select: Selection | dict[str, Any] = field(default_factory=Selection)

    def __post_init__(self) -> None:
        """Check what makes up the source."""
        if self.beams < 1 or self.gallery < 0:
            raise ValueError("beams must be at least 1 and gallery must not be negative")
        if not set(self.scores) <= set(_SCORES):
            raise ValueError(f"scores are {list(self.scores)}: choose of {', '.join(_SCORES)}")
        if not all(isinstance(name, str) for name in self.accepted):
            raise ValueError(
                f"accepted has names that are no text, {list(self.accepted)}: YAML reads true so; quote it"
            )
        if not self.scores and not self.accepted:
            raise ValueError("nothing is measured: give scores or accepted")
        self._source = EvaluationSource(
            shards=self.shards,
            image=self.image,
            text=self.text,
            accepted=self.accepted,
            max_samples=self.max_samples,
            select=as_selection(self.select),
        )

    def check(self) -> None:
        """Find the shards, and what computes the scores."""
        check_found(self._source)
        if self.scores and importlib.util.find_spec("pycocoevalcap") is None:
            raise UserError(
                f"scores={list(self.scores)} are computed by pycocoevalcap, which is not installed: "
                "pip install 'siglip-train[captions]', or set scores=[] and accepted"
            )

    def run(self, encoder: Encoder) -> Evaluation:
        """Caption every image. All ranks."""
        captioner, world = encoder.captioner(), encoder.world
        loader = encoder.loader(self._source)
        mine = list[_Answer]()
        prior: str | None = None
        for batch, features in encoder.featured(loader):
            said = captioner.caption(features, self.beams)
            if prior is None:
                # tokens that are all alike give one caption, however many they are
                blind = features._replace(tokens=torch.zeros_like(features.tokens[:1]), mask=None)
                (prior,) = captioner.caption(blind, self.beams)
            mine += [
                _Answer(
                    place, text, prior, tuple(each.text for each in references),
                    _standing(text, accepted), _standing(prior, accepted),
                )
                for place, text, references, accepted in zip(
                    batch.index.tolist(), said, batch.captions, batch.accepted, strict=True
                )
                if place >= 0
            ]  # fmt: skip
        everyone = [answer for part in gather_objects(mine) for answer in part]
        all_counts = gather_objects(Counter(loader.counts))
        if not everyone:
            raise UserError(f"no usable image in {self.shards}; bad samples, if any, are named in the log")
        metrics = self._metrics(everyone)
        if not world.is_main:
            return Evaluation(metrics, {})
        chosen = [everyone[place] for place in spread(len(everyone), self.gallery)]
        shown = [_shown(loader.original(answer.place), answer) for answer in chosen]
        counts = dict(sum(all_counts, Counter()))
        return Evaluation(metrics, {"captions": shown, "tokenizer": _TOKENIZER, "counts": counts})

    def _metrics(self, answers: Sequence[_Answer]) -> dict[str, float]:
        metrics = dict[str, float]()
        for name in self.accepted:
            metrics[f"{name}_acc"] = sum(each.right[name] for each in answers) / len(answers)
            metrics[f"prior_{name}_acc"] = sum(each.blind[name] for each in answers) / len(answers)
        if self.scores:
            metrics |= scored(
                [each.said for each in answers], [each.references for each in answers], self.scores
            )
            metrics["words"] = sum(len(words(each.said)) for each in answers) / len(answers)
        return {**metrics, "n": float(len(answers))}


_TOKENIZER = (
    "siglip_train.evals.captions.words, in place of the Penn treebank's of pycocoevalcap, which needs Java"
)


def scored(
    said: Sequence[str], references: Sequence[Sequence[str]], scores: Sequence[str] = _SCORES
) -> dict[str, float]:
    """CIDEr (0 to 10; papers print a hundred times as much) and BLEU 1 to 4 of one caption for each of n images.

    pycocoevalcap's scorers, on `words`. CIDEr weighs n-grams by how many of these n images have them.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    given = {place: [" ".join(words(text))] for place, text in enumerate(said)}
    known = {place: [" ".join(words(text)) for text in texts] for place, texts in enumerate(references)}
    found = dict[str, float]()
    if "cider" in scores:
        found["cider"] = float(Cider().compute_score(known, given)[0])
    if "bleu" in scores:
        values, _ = Bleu(4).compute_score(known, given, verbose=0)
        found |= {f"bleu{order}": float(value) for order, value in enumerate(values, 1)}
    return found


def words(text: str) -> list[str]:
    """Lower-case words without punctuation marks, as near to the Penn treebank's as one expression comes."""
    found = list[str]()
    for word in _WORD.findall(text.lower().replace("’", "'")):
        found += [part for part in _ENDING.split(word) if part]
    return [word for word in found if word not in _LEFT_OUT]


def _standing(text: str, accepted: Mapping[str, Sequence[str]]) -> dict[str, bool]:
    return {name: _plain(text) in {_plain(each) for each in texts} for name, texts in accepted.items()}


def _plain(text: str) -> str:
    # tokenizers write some characters in another form of theirs
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _shown(image: Image.Image, answer: _Answer) -> dict[str, Any]:
    return {
        "picture": thumbnail(image, 192),
        "said": answer.said,
        "references": list(answer.references[:5]),
        "right": any(answer.right.values()) if answer.right else None,
    }
