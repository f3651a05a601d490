"""Image-text retrieval in both directions, with several captions an image, language by language."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_train.data.evaluation import EvaluationSource
from siglip_train.data.select import Selection, as_selection
from siglip_train.errors import UserError
from siglip_train.evals.base import Encoder, Evaluation, ImageSet
from siglip_train.evals.gallery import spread, thumbnail
from siglip_train.evals.ranking import best_ranks, recall_at, top

_CUT_OFFS = (1, 5, 10)


def retrieval_metrics(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    """Give recall@1/5/10, mean and median rank of both directions, under CLIP_benchmark's names.

    image_retrieval: a text finds its image. text_retrieval: an image finds any of its texts.
    Ranks count from 1.
    images `[n, E]`, texts `[m, E]`, owners `[m]`: the image of each text.
    """
    every_image = torch.arange(len(images), device=owners.device)
    directions = {
        "image_retrieval": best_ranks(texts, images, owners, every_image),
        "text_retrieval": best_ranks(images, texts, every_image, owners),
    }
    metrics: dict[str, float] = {}
    for direction, ranks in directions.items():
        metrics |= {f"{direction}_recall@{count}": recall_at(ranks, count) for count in _CUT_OFFS}
        metrics[f"{direction}_mean_rank"] = ranks.double().mean().item() + 1
        # the mean of the middle two rounded down, as open_clip does
        metrics[f"{direction}_median_rank"] = float(ranks.double().quantile(0.5).floor().item() + 1)
    return metrics


class _Texts(NamedTuple):
    """Captions of one language. images: `[n]` those that have one; owners: `[m]` positions in `images`."""

    words: list[str]
    embeddings: Tensor
    owners: Tensor
    images: Tensor


@dataclass(kw_only=True)
class Retrieval:
    """Retrieval recall on captioned shards; each language on its own, then averaged, as XM3600 is.

    text: member or `json:field` holding one caption, a list, or a mapping of language to captions.
    languages: those to measure; None = all there are. gallery: queries kept for the report.
    Metrics carry the average over languages and, where there are several, `<language>/<metric>`.
    """

    shards: str | list[str]
    text: str = "txt"
    image: str = EvaluationSource.image
    languages: list[str] | None = None
    max_samples: int | None = None
    select: Selection | dict[str, Any] = field(default_factory=Selection)
    gallery: int = 12

    def __post_init__(self) -> None:
        """Check the selection."""
        self.select = as_selection(self.select)

    def run(self, encoder: Encoder) -> Evaluation:
        """Embed images and captions, rank both ways. All ranks."""
        images = encoder.encode_images(
            EvaluationSource(
                shards=self.shards,
                image=self.image,
                text=self.text,
                max_samples=self.max_samples,
                select=as_selection(self.select),
            )
        )
        languages = self._embed_captions(images, encoder)
        # on every rank alike: 5k x 25k scores take a GPU milliseconds, less than sharing them out would
        device = encoder.world.device
        by_language = {
            language: retrieval_metrics(
                images.embeddings[texts.images].to(device),
                texts.embeddings.to(device),
                texts.owners.to(device),
            )
            for language, texts in languages.items()
        }
        details = self._details(images, languages, by_language) if encoder.world.is_main else {}
        return Evaluation(_averaged(by_language), details)

    def _embed_captions(self, images: ImageSet, encoder: Encoder) -> dict[str, _Texts]:
        entries = [
            (caption.language, caption.text, image)
            for image, captions in enumerate(images.captions)
            for caption in captions
        ]
        found = sorted({language for language, _, _ in entries})
        missing = [language for language in self.languages or [] if language not in found]
        if missing:
            raise UserError(
                f"no caption in {', '.join(missing)} in {self.shards} ({self.text}); "
                f"languages there: {', '.join(language or 'not named' for language in found)}"
            )
        wanted = self.languages or found
        entries = [entry for entry in entries if entry[0] in wanted]
        embeddings = encoder.encode_texts([text for _, text, _ in entries])
        return {language: _texts_of(language, entries, embeddings) for language in wanted}

    def _details(
        self, images: ImageSet, languages: dict[str, _Texts], by_language: dict[str, dict[str, float]]
    ) -> dict[str, Any]:
        details: dict[str, Any] = {
            "counts": images.counts,
            "languages": by_language,
            "similarity": _similarity(images, list(languages.values())),
            "image_retrieval": [],
            "text_retrieval": [],
        }
        for place, (language, texts) in enumerate(languages.items()):
            # each language takes other positions, so that the gallery shows as many images as it can
            captions, pictures = (
                spread(length, self.gallery)[place :: len(languages)]
                for length in (len(texts.words), len(texts.images))
            )
            details["image_retrieval"] += _found_images(images, language, texts, captions)
            details["text_retrieval"] += _found_texts(images, language, texts, pictures)
        return details


def _averaged(by_language: dict[str, dict[str, float]]) -> dict[str, float]:
    metrics = {
        name: sum(values[name] for values in by_language.values()) / len(by_language)
        for name in next(iter(by_language.values()))
    }
    if len(by_language) > 1:
        metrics |= {
            f"{language or 'unnamed'}/{name}": value
            for language, values in by_language.items()
            for name, value in values.items()
            if "recall" in name
        }
    return metrics


def _texts_of(language: str, entries: list[tuple[str, str, int]], embeddings: Tensor) -> _Texts:
    rows = [row for row, entry in enumerate(entries) if entry[0] == language]
    images, owners = torch.tensor([entries[row][2] for row in rows]).unique(return_inverse=True)
    return _Texts([entries[row][1] for row in rows], embeddings[rows], owners, images)


def _similarity(images: ImageSet, languages: list[_Texts], count: int = 24) -> dict[str, Any]:
    """Cosines of the first images (columns) and a caption of each (rows), languages in turn."""
    columns = sorted({image for texts in languages for image in texts.images[:count].tolist()})[:count]
    words, rows = [], []
    for turn, column in enumerate(columns):
        own = [
            (texts, row)
            for texts in languages
            for row in (texts.images[texts.owners] == column).nonzero().flatten()
        ]
        texts, row = own[turn % len(own)]
        words.append(texts.words[row])
        rows.append(texts.embeddings[row])
    values = torch.stack(rows) @ images.embeddings[columns].T  # [texts, images]
    return {
        "pictures": [thumbnail(images.picture(image), 48) for image in columns],
        "captions": words,
        "values": [[round(value, 3) for value in row] for row in values.tolist()],
    }


def _found_images(images: ImageSet, language: str, texts: _Texts, rows: list[int]) -> list[dict[str, Any]]:
    scores, places = top(texts.embeddings[rows], images.embeddings[texts.images], 5)
    return [
        {
            "query": texts.words[row],
            "language": language,
            "results": [
                {
                    "picture": thumbnail(images.picture(int(texts.images[place]))),
                    "score": round(score, 3),
                    "correct": place == int(texts.owners[row]),
                }
                for score, place in zip(found_scores, found, strict=True)
            ],
        }
        for row, found_scores, found in zip(rows, scores.tolist(), places.tolist(), strict=True)
    ]


def _found_texts(images: ImageSet, language: str, texts: _Texts, rows: list[int]) -> list[dict[str, Any]]:
    scores, places = top(images.embeddings[texts.images[rows]], texts.embeddings, 5)
    return [
        {
            "picture": thumbnail(images.picture(int(texts.images[row]))),
            "language": language,
            "results": [
                {
                    "text": texts.words[place],
                    "score": round(score, 3),
                    "correct": int(texts.owners[place]) == row,
                }
                for score, place in zip(found_scores, found, strict=True)
            ],
        }
        for row, found_scores, found in zip(rows, scores.tolist(), places.tolist(), strict=True)
    ]
